"""Who is measured: a registry of implementations, each at attention level and at module level.

A provider is a name, a way to draw it, and two small builders; a new one is one more entry at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from bench.workload import Workload
from isa_triton import InterlacedSparseSelfAttention, Partition, functional, fused, partitioned_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One implementation, how the plots draw it, and what makes its two forms from a workload.

    `attention` builds a function of q, k [B, H, W, 1, K] and v [B, H, W, 1, V] that returns the context, laid out as v;
    `module` builds a module from x [B, C, H, W] to [B, C, H, W].
    """

    name: str
    title: str
    colour: str
    marker: str
    line: str
    attention: Callable[[Workload], Attend]
    module: Callable[[Workload], nn.Module]
    kernels: bool = False  # made for GPUs alone: counted anywhere, run and timed there

    def runs_on(self, device: str) -> bool:
        """Whether the provider can be timed on a device; any can be counted on fake tensors."""
        return not self.kernels or torch.device(device).type in fused.DEVICES

    def build(self, workload: Workload, device: str = "cpu") -> Callable[..., Tensor]:
        """The callable that takes the workload's inputs."""
        if workload.level == "attention":
            return self.attention(workload)
        with _defaults(device, workload.dtype):  # Module.to cannot move parameters that a counter follows
            return self.module(workload).train(workload.training)


@contextmanager
def _defaults(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Where and in which type tensors are made unless told."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention through torch's fused one, whose memory is linear in the pixels.

    The fused kernels want unit strides and values as wide as keys; else torch falls back to materialised scores. So the
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


class FusedSelfAttention(reference.SelfAttention):
    """The dense stage with torch's fused attention inside."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fused_attention(q, k, v)


def unfused_attention(workload: Workload) -> Attend:
    """ISA the authors' way: pad; in each stage permute, copy, matmul, softmax, matmul, permute back; crop."""
    p, (top, bottom, left, right) = workload.partition_size, _padding(workload)
    rows, columns = slice(top, top + workload.height), slice(left, left + workload.width)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if bottom or right:
            q, k, v = (F.pad(tensor, (0, 0, 0, 0, left, right, top, bottom)) for tensor in (q, k, v))
        context = reference.long_range_attention(q, k, v, p)
        return reference.short_range_attention(q, k, context, p)[:, rows, columns]

    return attention


class UnfusedBlock(nn.Module):
    """ISA the authors' way: the whole map is permuted and copied to groups, and a dense stage runs on each."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.p, self.padding = workload.partition_size, _padding(workload)
        self.long_range, self.short_range = dense_stage(workload), dense_stage(workload)

    def forward(self, x: Tensor) -> Tensor:
        (P_h, P_w), (top, bottom, left, right), (H, W) = self.p, self.padding, x.shape[2:]
        if bottom or right:
            x = F.pad(x, (left, right, top, bottom))
        B, C, Q_h, Q_w = *x.shape[:2], x.shape[2] // P_h, x.shape[3] // P_w
        x = x.reshape(B, C, Q_h, P_h, Q_w, P_w).permute(0, 3, 5, 1, 2, 4).reshape(-1, C, Q_h, Q_w)
        x = self.long_range(x)
        x = x.reshape(B, P_h, P_w, C, Q_h, Q_w).permute(0, 4, 5, 3, 1, 2).reshape(-1, C, P_h, P_w)
        x = self.short_range(x)
        x = x.reshape(B, Q_h, Q_w, C, P_h, P_w).permute(0, 3, 1, 4, 2, 5).reshape(B, C, Q_h * P_h, Q_w * P_w)
        return x[:, :, top : top + H, left : left + W]


def _padding(workload: Workload) -> tuple[int, int, int, int]:
    """Zeros at the top, bottom, left and right that make P divide the map; the smaller half comes first."""
    pad_h, pad_w = -workload.height % workload.partition_size[0], -workload.width % workload.partition_size[1]
    return pad_h // 2, pad_h - pad_h // 2, pad_w // 2, pad_w - pad_w // 2


def dense_stage(workload: Workload, stage: type[reference.SelfAttention] = reference.SelfAttention) -> nn.Module:
    """The authors' self-attention block over all pixels of its input, C -> C channels."""
    return stage(workload.channels, workload.key_channels, workload.value_channels, workload.channels, "dense")


def isa_attention(workload: Workload) -> Attend:
    """Ours: long range on (q, k, v), then short range on (q, k, the first's context), where they lie."""
    size = workload.height, workload.width
    long_range = Partition.interlaced(size, stride=workload.partition_size)
    short_range = Partition.local(size, window=workload.partition_size)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return partitioned_attention(q, k, partitioned_attention(q, k, v, long_range), short_range)

    return attention


def isa_module(
    workload: Workload, block: type[InterlacedSparseSelfAttention] = InterlacedSparseSelfAttention
) -> nn.Module:
    """Ours, with the authors' padding, so that every module here that interlaces is the same function."""
    widths = workload.channels, workload.key_channels, workload.value_channels
    return block(*widths, partition_size=workload.partition_size, padding="zeros")


@contextmanager
def _kernels_chosen() -> Iterator[None]:
    """Inside, attention goes through the Triton operators wherever its tensors lie: fake ones run their fakes alone."""
    with patch.object(functional, "_choose", lambda backend, q: "triton"):
        yield


class FusedISA(InterlacedSparseSelfAttention):
    """Ours by the Triton operators, as on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        with _kernels_chosen():
            return super().forward(x)


def fused_isa_attention(workload: Workload) -> Attend:
    """`isa_attention` by the Triton operators, as on a GPU."""
    return _kernels_chosen()(isa_attention(workload))


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(
            name="dense",
            title="dense (non-local, scores in memory)",
            colour="#D55E00",
            marker="o",
            line="-",
            attention=lambda workload: reference.dense_attention,
            module=dense_stage,
        ),
        Provider(
            name="dense-sdpa",
            title="dense-sdpa (the same, fused by torch)",
            colour="#E69F00",
            marker="s",
            line="--",
            attention=lambda workload: fused_attention,
            module=lambda workload: dense_stage(workload, FusedSelfAttention),
        ),
        Provider(
            name="unfused",
            title="unfused (ISA, permuted and copied)",
            colour="#56B4E9",
            marker="^",
            line="-.",
            attention=unfused_attention,
            module=UnfusedBlock,
        ),
        Provider(
            name="isa",
            title="isa (ours)",
            colour="#0072B2",
            marker="D",
            line="-",
            attention=isa_attention,
            module=isa_module,
        ),
        Provider(
            name="isa-triton",
            title="isa-triton (ours on a GPU)",
            colour="#009E73",
            marker="v",
            line="--",
            attention=fused_isa_attention,
            module=lambda workload: isa_module(workload, FusedISA),
            kernels=True,
        ),
    )
}
