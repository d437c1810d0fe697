"""The compared modules at their strongest: the same functions with memory linear in the pixels.

By torch's scaled_dot_product_attention (sdpa), or by ours over another partition.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from isa_triton import Partition, partitioned_attention, partitioned_attention_with_lse


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention through torch's own, whose memory is linear in the pixels.

    Its kernels want unit strides and values as wide as keys; else torch falls back to materialised scores. So the
    value goes through in chunks of the key width; the scores are computed once a chunk, and the FLOP count says so.
    """
    size, width, wanted = q.shape[1:3], q.shape[-1], v.shape[-1]
    if wanted % width:
        v = F.pad(v, (0, -wanted % width))
    q, k, v = (tensor.flatten(1, 2).transpose(1, 2) for tensor in (q, k, v))  # [B, heads, H W, width]
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    chunks = [F.scaled_dot_product_attention(q, k, chunk) for chunk in v.split(width, -1)]
    context = (torch.cat(chunks, -1) if len(chunks) > 1 else chunks[0])[..., :wanted]
    return context.transpose(1, 2).unflatten(1, size)


class SdpaSelfAttention(reference.SelfAttention):
    """The dense stage by sdpa."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa_attention(q, k, v)


class SdpaSA(reference.SA):
    """The ISA authors' dense baseline by sdpa."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa_attention(q, k, v)


def dense_partition_attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> Tensor:
    """Dense attention as ours over the dense partition: by the kernels, its memory is linear in the pixels."""
    return partitioned_attention(q, k, v, Partition.dense((q.shape[1], q.shape[2])), backend=backend)


class PartitionedNonLocal(reference.NonLocal):
    """The non-local block by our attention over the dense partition."""

    def __init__(self, channels: int, backend: str = "auto") -> None:
        super().__init__(channels)
        self.backend = backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense_partition_attention(q, k, v, self.backend)


def criss_cross_attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0, backend: str = "auto") -> Tensor:
    """`reference.criss_cross_attention` as ours over rows and over columns, merged by their lse.

    With Z the sums of exp(scores), a pixel's row and column together have Z = Z_row + Z_column - exp(s), where s is the
    pixel's own score: both have counted it. Z is no less than Z_row or Z_column, so nothing cancels.
    """
    size = q.shape[1], q.shape[2]
    row, lse_row = partitioned_attention_with_lse(q, k, v, Partition.rows(size), scale=scale, backend=backend)
    column, lse_column = partitioned_attention_with_lse(q, k, v, Partition.columns(size), scale=scale, backend=backend)
    own = scale * (q.to(lse_row.dtype) * k.to(lse_row.dtype)).sum(-1)  # [B, H, W, heads]
    largest = torch.maximum(lse_row, lse_column).detach()
    z_row, z_column, z_own = (torch.exp(lse - largest) for lse in (lse_row, lse_column, own))
    z = z_row + z_column - z_own
    row_part, column_part, own_part = ((part / z).to(v.dtype).unsqueeze(-1) for part in (z_row, z_column, z_own))
    return row_part * row + column_part * column - own_part * v


class PartitionedRCCA(reference.RCCA):
    """Recurrent criss-cross attention by our attention over rows and columns."""

    def __init__(self, channels: int, backend: str = "auto") -> None:
        super().__init__(channels)
        self.backend = backend

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return criss_cross_attention(q, k, v, backend=self.backend)


class PartitionedRCCAHead(reference.RCCAHead):
    """CCNet's head with our attention over rows and columns inside."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(in_channels, channels)
        self.attention = PartitionedRCCA(channels)


class SingleMap(nn.Module):
    """A module with pooled branches, trained on a batch of one map.

    One map pooled to one cell has no statistics over the batch; those branches normalise by their running ones.
    """

    def train(self, mode: bool = True) -> SingleMap:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, reference.Pooled):
                module.eval()
        return self


class SingleMapPPM(SingleMap, reference.PPM):
    """Pyramid pooling for a batch of one."""


class SingleMapASPP(SingleMap, reference.ASPP):
    """Atrous spatial pyramid pooling for a batch of one."""
