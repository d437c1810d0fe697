"""Who is compared: one registry of implementations, at attention level, at module level, and as segmentation heads.

A provider is a name and up to three builders, one a level; a new one is one more entry at the end of this file, and how
the plots draw it one more line of `bench.figures`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import reference
from bench.compared import libraries, modules
from bench.compared.heads import CONTEXTS, DENSE_AS_PUBLISHED, base_oc, behind_conv, of_channels
from bench.compared.modules import Attend, dense_stage, in_stages
from bench.workload import Workload
from isa_triton import partitioned_attention
from isa_triton.backend.triton import DEVICES


@dataclass(frozen=True)
class Provider:
    """One implementation, and what makes its forms from a workload.

    `attention` builds a function of q, k [B, H, W, 1, K] and v [B, H, W, 1, V] that returns the context, laid out as v;
    `module` builds a module from x [B, C, H, W] to [B, C, H, W], `head` one from [B, 4 C, H, W] to [B, C, H, W]. What
    has no form at a level leaves it out.
    """

    name: str
    attention: Callable[[Workload], Attend] | None = None
    module: Callable[[Workload], nn.Module] | None = None
    head: Callable[[Workload], nn.Module] | None = None
    kernels: bool = False  # made for GPUs alone: counted anywhere, run and timed there
    package: str = "torch"  # that has to be installed
    compiles: bool = False  # on a first call, which is not timed
    volumes: bool = False  # takes maps of three axes too
    compiled: bool = False  # by torch.compile where it runs; what is counted is the form that is compiled
    refuses: Callable[[Workload], str | None] = lambda workload: None  # why a workload has no form, if so

    def obstacle(self, workload: Workload) -> str | None:
        """Why there is nothing to count or to run for a workload, or None."""
        if not find_spec(self.package):
            return f"needs {self.package}, which is not installed (pip install {self.package})"
        if getattr(self, workload.level) is None:
            return f"has no form of its own at {workload.level} level"
        if workload.depth is not None and not (self.volumes and workload.level != "head"):
            return f"has no form of its own for volumes at {workload.level} level"
        return self.refuses(workload)

    def in_a_graph(self) -> Provider:
        """The same, compiled by torch.compile."""
        return replace(self, name=f"{self.name}-compiled", compiles=True, compiled=True)

    def again(self) -> Provider:
        """The same once more: what the two differ by in one run is noise."""
        return replace(self, name=f"{self.name}-again")

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
        before = torch.get_default_dtype()
        torch.set_default_dtype(workload.dtype)
        try:
            with torch.device(device):  # Module.to cannot move parameters that a counter follows
                form = getattr(self, workload.level)(workload)
        finally:
            torch.set_default_dtype(before)
        return form.train(workload.training) if isinstance(form, nn.Module) else form


def cgnl_attention(expand: Callable[[Tensor], Tensor] = lambda x: x) -> Attend:
    """Compact generalized non-local attention t <p, g> in one group: its result is as wide as t, so that is v."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t, p, g = (x.flatten(1)[:, None, None] for x in (v, q, k))  # [B, 1, 1, H W width]
        return reference.compact_generalized_attention(expand(t), expand(p), g).view_as(v)

    return attention


def criss_cross_twice(once: Callable[..., Tensor]) -> Attend:
    """Recurrent criss-cross attention: on (q, k, v), then on (q, k, the first's context); scaled, as all here are."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[-1] ** -0.5
        return once(q, k, once(q, k, v, scale), scale)

    return attention


def of_any_workload(attention: Attend) -> Callable[[Workload], Attend]:
    """Attention that asks a workload for nothing."""
    return lambda workload: attention


def multiples_of(number: int) -> Callable[[Workload], str | None]:
    """What a block whose widths are fractions of C says to a workload."""

    def refuses(workload: Workload) -> str | None:
        fits = workload.level == "attention" or workload.channels % number == 0
        return None if fits else f"takes multiples of {number} channels"

    return refuses


_kernels: dict[str, Any] = {"backend": "triton"}
# What the plots show unless told: each way to attend, by whoever is best known for it.
DRAWN = ("dense", "dense-sdpa", "rcca", "cgnl", "unfused", "unfused-compiled", "isa", "isa-compiled", "isa-triton")
_UNFUSED = Provider(
    "unfused",
    attention=modules.permuted_attention,
    module=modules.PermutedBlock,
    head=behind_conv(modules.PermutedModule),
    volumes=True,
)
_ISA = Provider(
    "isa", attention=in_stages(partitioned_attention), module=modules.isa_block, head=CONTEXTS["ISA"], volumes=True
)
_PROVIDERS = (
    Provider(
        "dense",
        attention=of_any_workload(reference.dense_attention),
        module=dense_stage,
        head=DENSE_AS_PUBLISHED,
        volumes=True,
    ),
    Provider(
        "dense-sdpa",
        attention=of_any_workload(modules.sdpa_attention),
        module=partial(dense_stage, stage=modules.SdpaSelfAttention),
        head=CONTEXTS["SA"],
        volumes=True,
    ),
    Provider("nonlocal", module=of_channels(reference.NonLocal), refuses=multiples_of(2)),
    Provider(
        "nonlocal-triton",
        attention=of_any_workload(partial(modules.dense_partition_attention, **_kernels)),
        module=of_channels(partial(modules.PartitionedNonLocal, **_kernels)),
        kernels=True,
        refuses=multiples_of(2),
    ),
    Provider("sa", module=partial(base_oc, module=reference.SA)),
    Provider(
        "rcca",
        attention=of_any_workload(criss_cross_twice(reference.criss_cross_attention)),
        module=of_channels(reference.RCCA),
        head=lambda workload: reference.RCCAHead(workload.in_channels, workload.channels),
        refuses=multiples_of(8),
    ),
    Provider(
        "rcca-triton",
        attention=of_any_workload(criss_cross_twice(partial(modules.criss_cross_attention, **_kernels))),
        module=of_channels(partial(modules.PartitionedRCCA, **_kernels)),
        kernels=True,
        refuses=multiples_of(8),
    ),
    Provider(
        "cgnl",
        attention=of_any_workload(cgnl_attention()),
        module=of_channels(reference.CGNL),
        head=behind_conv(of_channels(reference.CGNL)),
        refuses=multiples_of(16),
    ),
    Provider(
        "cgnlx",
        attention=of_any_workload(cgnl_attention(reference.gaussian_expansion)),
        module=of_channels(reference.CGNLx),
        refuses=multiples_of(16),
    ),
    Provider(
        "ppm",
        module=lambda workload: modules.SingleMapPPM(workload.channels, workload.channels),
        head=lambda workload: modules.SingleMapPPM(workload.in_channels, workload.channels),
        refuses=multiples_of(4),
    ),
    Provider("aspp", module=lambda workload: modules.SingleMapASPP(workload.channels, workload.channels)),
    Provider(
        "timm",
        attention=in_stages(libraries.timm),
        module=libraries.TimmStages,
        package="timm",
        refuses=libraries.timm_refuses,
    ),
    Provider("flex", attention=in_stages(libraries.flex), refuses=libraries.forward_only, compiles=True),
    Provider("natten", attention=in_stages(libraries.natten), package="natten", refuses=libraries.natten_refuses),
    _UNFUSED,
    _UNFUSED.in_a_graph(),
    _ISA,
    _ISA.in_a_graph(),
    Provider(
        "isa-triton",
        attention=in_stages(partial(partitioned_attention, **_kernels)),
        module=partial(modules.isa_block, **_kernels),
        kernels=True,
        volumes=True,
    ),
)
PROVIDERS = {provider.name: provider for provider in _PROVIDERS}
