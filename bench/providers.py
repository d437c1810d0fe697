"""Who is measured: a registry of implementations, at attention level, at module level, and as segmentation heads.

A provider is a name, a way to draw it, and up to three small builders; a new one is one more entry at the end of this
file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from bench import heads, opponents, peers
from bench.workload import Workload
from isa_triton import InterlacedSparseSelfAttention, ISAHead, Partition, partitioned_attention
from isa_triton.backend.triton import DEVICES

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One implementation, how the plots draw it, and what makes its two forms from a workload.

    `attention` builds a function of q, k [B, H, W, 1, K] and v [B, H, W, 1, V] that returns the context, laid out as v;
    `module` builds a module from x [B, C, H, W] to [B, C, H, W], `head` one from [B, 4 C, H, W] to [B, C, H, W]. What
    has no form at a level leaves it out.
    """

    name: str
    title: str
    colour: str
    marker: str
    line: str
    attention: Callable[[Workload], Attend] | None = None
    module: Callable[[Workload], nn.Module] | None = None
    head: Callable[[Workload], nn.Module] | None = None
    kernels: bool = False  # made for GPUs alone: counted anywhere, run and timed there
    package: str = "torch"  # that has to be installed
    compiles: bool = False  # on a first call, which is not timed
    refuses: Callable[[Workload], str | None] = lambda workload: None  # why a workload has no form, if so

    def obstacle(self, workload: Workload) -> str | None:
        """Why there is nothing to count or to run for a workload, or None."""
        if not find_spec(self.package):
            return f"needs {self.package}, which is not installed (pip install {self.package})"
        if getattr(self, workload.level) is None:
            return f"has no form of its own at {workload.level} level"
        return self.refuses(workload)

    def runs_on(self, device: str) -> bool:
        """Whether the provider can be timed on a device; any can be counted on fake tensors."""
        return not self.kernels or torch.device(device).type in DEVICES

    def build(self, workload: Workload, device: str = "cpu") -> Callable[..., Tensor]:
        """The callable that takes the workload's inputs.

        Raises:
            ValueError: the provider has none, as `obstacle` says.
        """
        if obstacle := self.obstacle(workload):
            raise ValueError(f"{self.name} {obstacle}")
        if workload.level == "attention":
            assert self.attention is not None
            return self.attention(workload)
        make = self.module if workload.level == "module" else self.head
        assert make is not None
        with _defaults(device, workload.dtype):  # Module.to cannot move parameters that a counter follows
            return make(workload).train(workload.training)


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


class UnfusedModule(nn.Module):
    """The block beside its input, through conv1x1 + BN + ReLU and dropout: the paper's ISA module."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.block = UnfusedBlock(workload)
        self.fuse, self.dropout = reference.ConvNormReLU(2 * workload.channels, workload.channels), nn.Dropout2d(0.05)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fuse(torch.cat([x, self.block(x)], 1)))


def dense_stage(workload: Workload, stage: type[reference.SelfAttention] = reference.SelfAttention) -> nn.Module:
    """The authors' self-attention block over all pixels of its input, C -> C channels."""
    return stage(workload.channels, workload.key_channels, workload.value_channels, workload.channels, "dense")


def isa_attention(workload: Workload, backend: str = "auto") -> Attend:
    """Ours: long range on (q, k, v), then short range on (q, k, the first's context), where they lie."""
    size = workload.height, workload.width
    long_range = Partition.interlaced(size, stride=workload.partition_size)
    short_range = Partition.local(size, window=workload.partition_size)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        context = partitioned_attention(q, k, v, long_range, backend=backend)
        return partitioned_attention(q, k, context, short_range, backend=backend)

    return attention


def isa_module(workload: Workload, backend: str = "auto") -> nn.Module:
    """Ours, with the authors' padding, so that every module here that interlaces is the same function."""
    widths = workload.channels, workload.key_channels, workload.value_channels
    return InterlacedSparseSelfAttention(
        *widths, partition_size=workload.partition_size, padding="zeros", backend=backend
    )


def isa_head(workload: Workload) -> nn.Module:
    """Ours before its classifier, with the published order of things."""
    head = ISAHead(
        workload.in_channels,
        workload.channels,
        num_classes=1,
        key_channels=workload.key_channels,
        partition_size=workload.partition_size,
    )
    return nn.Sequential(head.reduce, head.isa)


def behind_conv(block: Callable[[Workload], nn.Module]) -> Callable[[Workload], nn.Module]:
    """conv3x3 + BN + ReLU to C channels, and the block."""
    return lambda workload: heads.behind_conv(lambda _: block(workload))(workload.in_channels, workload.channels)


def base_oc(workload: Workload, module: type[reference.SA] = reference.SA) -> nn.Module:
    """The authors' dense baseline: values as wide as keys, fused with its input."""
    return module(workload.channels, workload.key_channels, workload.key_channels, workload.channels)


def cgnl_attention(expand: Callable[[Tensor], Tensor] = lambda x: x) -> Callable[[Workload], Attend]:
    """Compact generalized non-local attention t <p, g> in one group: its result is as wide as t, so that is v."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t, p, g = (x.flatten(1)[:, None, None] for x in (v, q, k))  # [B, 1, 1, H W width]
        return reference.compact_generalized_attention(expand(t), expand(p), g).view_as(v)

    return lambda workload: attention


def criss_cross_twice(once: Callable[..., Tensor]) -> Callable[[Workload], Attend]:
    """Recurrent criss-cross attention: on (q, k, v), then on (q, k, the first's context); scaled, as all here are."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        return once(q, k, once(q, k, v, scale), scale)

    return lambda workload: attention


def multiples_of(number: int) -> Callable[[Workload], str | None]:
    """What a block whose widths are fractions of C says to a workload."""

    def refuses(workload: Workload) -> str | None:
        fits = workload.level == "attention" or workload.channels % number == 0
        return None if fits else f"takes multiples of {number} channels"

    return refuses


# What the plots show unless told: each way to attend, by whoever is best known for it.
COMPARED = ("dense", "dense-sdpa", "rcca", "cgnl", "unfused", "isa", "isa-triton")
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
            head=behind_conv(base_oc),
        ),
        Provider(
            name="dense-sdpa",
            title="dense-sdpa (the same, by torch's scaled_dot_product_attention)",
            colour="#E69F00",
            marker="s",
            line="--",
            attention=lambda workload: opponents.fused_attention,
            module=lambda workload: dense_stage(workload, opponents.FusedSelfAttention),
            head=behind_conv(partial(base_oc, module=opponents.FusedSA)),
        ),
        Provider(
            name="nonlocal",
            title="nonlocal (the non-local block)",
            colour="#8C510A",
            marker="p",
            line=":",
            module=lambda workload: reference.NonLocal(workload.channels),
            refuses=multiples_of(2),
        ),
        Provider(
            name="nonlocal-triton",
            title="nonlocal-triton (the same, our kernels on a GPU)",
            colour="#BF812D",
            marker="P",
            line="--",
            attention=lambda workload: partial(opponents.dense_partition_attention, backend="triton"),
            module=lambda workload: opponents.FusedNonLocal(workload.channels, backend="triton"),
            kernels=True,
            refuses=multiples_of(2),
        ),
        Provider(
            name="sa",
            title="sa (Base-OC, the authors' dense baseline)",
            colour="#5E3C08",
            marker="h",
            line="-.",
            module=base_oc,
        ),
        Provider(
            name="rcca",
            title="rcca (criss-cross, twice)",
            colour="#CC79A7",
            marker="X",
            line=":",
            attention=criss_cross_twice(reference.criss_cross_attention),
            module=lambda workload: reference.RCCA(workload.channels),
            head=lambda workload: reference.RCCAHead(workload.in_channels, workload.channels),
            refuses=multiples_of(8),
        ),
        Provider(
            name="rcca-triton",
            title="rcca-triton (the same, our kernels on a GPU)",
            colour="#882255",
            marker="d",
            line="--",
            attention=criss_cross_twice(partial(opponents.criss_cross_attention, backend="triton")),
            module=lambda workload: opponents.FusedRCCA(workload.channels, backend="triton"),
            kernels=True,
            refuses=multiples_of(8),
        ),
        Provider(
            name="cgnl",
            title="cgnl (linear, no softmax)",
            colour="#000000",
            marker="*",
            line="-.",
            attention=cgnl_attention(),
            module=lambda workload: reference.CGNL(workload.channels),
            head=behind_conv(lambda workload: reference.CGNL(workload.channels)),
            refuses=multiples_of(16),
        ),
        Provider(
            name="cgnlx",
            title="cgnlx (cgnl, expanded to third order)",
            colour="#666666",
            marker="*",
            line=":",
            attention=cgnl_attention(reference.gaussian_expansion),
            module=lambda workload: reference.CGNLx(workload.channels),
            refuses=multiples_of(16),
        ),
        Provider(
            name="ppm",
            title="ppm (pyramid pooling)",
            colour="#999933",
            marker="<",
            line="-.",
            module=lambda workload: opponents.SingleMapPPM(workload.channels, workload.channels),
            head=lambda workload: opponents.SingleMapPPM(workload.in_channels, workload.channels),
            refuses=multiples_of(4),
        ),
        Provider(
            name="aspp",
            title="aspp (dilated convolutions)",
            colour="#AAAA00",
            marker=">",
            line="-.",
            module=lambda workload: opponents.SingleMapASPP(workload.channels, workload.channels),
        ),
        Provider(
            name="timm",
            title="timm (MaxViT's grid and block attention)",
            colour="#332288",
            marker="H",
            line=":",
            attention=peers.timm_attention,
            module=peers.TimmStages,
            package="timm",
            refuses=peers.timm_refuses,
        ),
        Provider(
            name="flex",
            title="flex (FlexAttention, masked)",
            colour="#117733",
            marker="8",
            line=":",
            attention=peers.in_two_stages(peers.flex),
            refuses=peers.forward_only,
            compiles=True,
        ),
        Provider(
            name="natten",
            title="natten (dilated and strided neighbourhoods)",
            colour="#44AA99",
            marker="D",
            line=":",
            attention=peers.in_two_stages(peers.natten),
            package="natten",
            refuses=peers.natten_refuses,
        ),
        Provider(
            name="unfused",
            title="unfused (ISA, permuted and copied)",
            colour="#56B4E9",
            marker="^",
            line="-.",
            attention=unfused_attention,
            module=UnfusedBlock,
            head=behind_conv(UnfusedModule),
        ),
        Provider(
            name="isa",
            title="isa (ours)",
            colour="#0072B2",
            marker="D",
            line="-",
            attention=isa_attention,
            module=isa_module,
            head=isa_head,
        ),
        Provider(
            name="isa-triton",
            title="isa-triton (ours on a GPU)",
            colour="#009E73",
            marker="v",
            line="--",
            attention=lambda workload: isa_attention(workload, backend="triton"),
            module=lambda workload: isa_module(workload, backend="triton"),
            kernels=True,
        ),
    )
}
