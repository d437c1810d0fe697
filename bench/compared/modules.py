"""The compared modules: ISA, ours and the authors' way, and the others at their strongest.

At their strongest they are the same functions with memory linear in the pixels: by torch's scaled_dot_product_attention
(sdpa), or by ours over another partition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from bench.workload import Workload
from isa_triton import InterlacedSparseSelfAttention, Partition, partitioned_attention, partitioned_attention_with_lse
from isa_triton.maps import crop, make_partition, pad_to_multiple

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

# -- ISA ---------------------------------------------------------------------------------------------------------------


def in_stages(
    attend: Callable[[Tensor, Tensor, Tensor, Partition], Tensor], patterns: Sequence[str] = ("interlaced", "local")
) -> Callable[[Workload], Attend]:
    """Attention in stages, each on (q, k, the context of the one before) where they lie; ISA's two unless told."""

    def build(workload: Workload) -> Attend:
        partitions = [make_partition(pattern, workload.size, workload.partition_size) for pattern in patterns]

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for partition in partitions:
                v = attend(q, k, v, partition)
            return v

        return attention

    return build


def isa_block(workload: Workload, backend: str = "auto") -> nn.Module:
    """Ours, with the authors' padding, so that every module here that interlaces is the same function."""
    return InterlacedSparseSelfAttention(
        *workload.widths,
        axes=len(workload.size),
        partition_size=workload.partition_size,
        padding="zeros",
        backend=backend,
    )


def permuted_attention(workload: Workload) -> Attend:
    """The authors' way: pad; in each stage permute, copy, matmul, softmax, matmul, permute back; crop."""
    p = workload.partition_size

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (_pixels(pad_to_multiple(_map(x), p)) for x in (q, k, v))
        context = reference.short_range_attention(q, k, reference.long_range_attention(q, k, v, p), p)
        return _pixels(crop(_map(context), workload.size))

    return attention


def _map(x: Tensor) -> Tensor:
    return x.squeeze(-2).movedim(-1, 1)  # [B, width, H, W]


def _pixels(x: Tensor) -> Tensor:
    return x.movedim(1, -1).unsqueeze(-2)  # [B, H, W, 1, width]


def dense_stage(workload: Workload, stage: type[reference.SelfAttention] = reference.SelfAttention) -> nn.Module:
    """The authors' self-attention block over all pixels of its input, C -> C channels."""
    return stage(*workload.widths, workload.channels, "dense", workload.partition_size)


class PermutedBlock(nn.Module):
    """The authors' way: the whole map is permuted and copied to groups, and a dense stage runs on each."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.p = workload.partition_size
        self.long_range, self.short_range = dense_stage(workload), dense_stage(workload)

    def forward(self, x: Tensor) -> Tensor:
        p, n, size = self.p, len(self.p), x.shape[2:]
        x = pad_to_multiple(x, p)
        B, C, whole = *x.shape[:2], x.shape[2:]
        q = [extent // part for extent, part in zip(whole, p, strict=True)]
        split = [part for pair in zip(q, p, strict=True) for part in pair]  # Q_h, P_h, Q_w, P_w
        quotients, remainders = range(2, 2 + 2 * n, 2), range(3, 3 + 2 * n, 2)
        x = x.reshape(B, C, *split).permute(0, *remainders, 1, *quotients).reshape(-1, C, *q)
        x = self.long_range(x)
        to_windows = 0, *range(2 + n, 2 + 2 * n), 1 + n, *range(1, 1 + n)
        x = x.reshape(B, *p, C, *q).permute(to_windows).reshape(-1, C, *p)
        x = self.short_range(x)
        to_map = 0, 1 + n, *(axis for i in range(n) for axis in (1 + i, 2 + n + i))
        x = x.reshape(B, *q, C, *p).permute(to_map).reshape(B, C, *whole)
        return crop(x, size)


class PermutedModule(nn.Module):
    """The block beside its input, through conv1x1 + BN + ReLU and dropout: the paper's ISA module."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.block = PermutedBlock(workload)
        self.join, self.dropout = reference.ConvNormReLU(2 * workload.channels, workload.channels), nn.Dropout2d(0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.join(torch.cat([x, self.block(x)], 1)))


# -- dense and criss-cross attention, and pooling ----------------------------------------------------------------------


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention through torch's own, whose memory is linear in the pixels.

    Its kernels want unit strides and values as wide as keys; else torch falls back to materialised scores. So the
    value goes through in chunks of the key width; the scores are computed once a chunk, and the FLOP count says so.
    """
    size, width, wanted = q.shape[1:-2], q.shape[-1], v.shape[-1]
    if wanted % width:
        v = F.pad(v, (0, -wanted % width))
    q, k, v = (tensor.flatten(1, -3).transpose(1, 2) for tensor in (q, k, v))  # [B, heads, H W, width]
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    chunks = [F.scaled_dot_product_attention(q, k, chunk) for chunk in v.split(width, -1)]
    context = (torch.cat(chunks, -1) if len(chunks) > 1 else chunks[0])[..., :wanted]
    return context.transpose(1, 2).unflatten(1, size)


class SdpaSelfAttention(reference.SelfAttention):
    """The dense stage by sdpa."""

    attend = staticmethod(sdpa_attention)


class SdpaSA(reference.SA):
    """The ISA authors' dense baseline by sdpa."""

    attend = staticmethod(sdpa_attention)


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
