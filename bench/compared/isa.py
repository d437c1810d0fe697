"""ISA, ours and the authors' way: attention in stages, and blocks of them with their projections."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import reference
from bench.workload import Workload
from isa_triton import InterlacedSparseSelfAttention, Partition
from isa_triton.maps import crop, make_partition, pad_to_multiple

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


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


def module(workload: Workload, backend: str = "auto") -> nn.Module:
    """Ours, with the authors' padding, so that every module here that interlaces is the same function."""
    return InterlacedSparseSelfAttention(
        *workload.widths, partition_size=workload.partition_size, padding="zeros", backend=backend
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
    return x.squeeze(3).permute(0, 3, 1, 2)  # [B, width, H, W]


def _pixels(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).unsqueeze(3)  # [B, H, W, 1, width]


def dense_stage(workload: Workload, stage: type[reference.SelfAttention] = reference.SelfAttention) -> nn.Module:
    """The authors' self-attention block over all pixels of its input, C -> C channels."""
    return stage(*workload.widths, workload.channels, "dense")


class PermutedBlock(nn.Module):
    """The authors' way: the whole map is permuted and copied to groups, and a dense stage runs on each."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.p = workload.partition_size
        self.long_range, self.short_range = dense_stage(workload), dense_stage(workload)

    def forward(self, x: Tensor) -> Tensor:
        (P_h, P_w), size = self.p, x.shape[2:]
        x = pad_to_multiple(x, self.p)
        B, C, Q_h, Q_w = *x.shape[:2], x.shape[2] // P_h, x.shape[3] // P_w
        x = x.reshape(B, C, Q_h, P_h, Q_w, P_w).permute(0, 3, 5, 1, 2, 4).reshape(-1, C, Q_h, Q_w)
        x = self.long_range(x)
        x = x.reshape(B, P_h, P_w, C, Q_h, Q_w).permute(0, 4, 5, 3, 1, 2).reshape(-1, C, P_h, P_w)
        x = self.short_range(x)
        x = x.reshape(B, Q_h, Q_w, C, P_h, P_w).permute(0, 3, 1, 4, 2, 5).reshape(B, C, Q_h * P_h, Q_w * P_w)
        return crop(x, size)


class PermutedModule(nn.Module):
    """The block beside its input, through conv1x1 + BN + ReLU and dropout: the paper's ISA module."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.block = PermutedBlock(workload)
        self.join, self.dropout = reference.ConvNormReLU(2 * workload.channels, workload.channels), nn.Dropout2d(0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.join(torch.cat([x, self.block(x)], 1)))
