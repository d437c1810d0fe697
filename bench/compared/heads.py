"""The segmentation heads that the paper compares, by name: from a backbone's map to its context, or to logits.

Dense and criss-cross attention keep no scores in memory: they are what `modules` makes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

import reference
from bench.compared import modules
from bench.workload import Workload
from isa_triton import ISAHead
from isa_triton.maps import Conv1x1
from isa_triton.models.resnet import out_channels


@dataclass(frozen=True)
class Widths:
    """What a head is made for, with the published ratio: keys half as wide as the head; a `Workload` has them too."""

    in_channels: int  # of the backbone's map
    channels: int  # of the head
    partition_size: tuple[int, int] = (8, 8)

    @property
    def key_channels(self) -> int:
        return self.channels // 2


Context = Callable[[Any], nn.Module]  # of Widths or a Workload: x [B, in_channels, H, W] -> [B, channels, H, W]


def isa_head(widths: Widths | Workload, num_classes: int = 1) -> ISAHead:
    """Ours, with its classifier."""
    key_channels, p = widths.key_channels, widths.partition_size
    return ISAHead(widths.in_channels, widths.channels, num_classes, key_channels=key_channels, partition_size=p)


def isa(widths: Widths | Workload) -> nn.Module:
    """Ours before its classifier."""
    head = isa_head(widths)
    return nn.Sequential(head.reduce, head.isa)


def base_oc(widths: Widths | Workload, module: type[reference.SA] = modules.SdpaSA) -> nn.Module:
    """The authors' dense baseline: values as wide as keys, joined with its input."""
    return module(widths.channels, widths.key_channels, widths.key_channels, widths.channels)


def behind_conv(block: Context, dropout: float = 0.0) -> Context:
    """conv3x3 + BN + ReLU to the head's width, then a block that keeps it, then dropout of channels if there is any."""

    def context(widths: Widths | Workload) -> nn.Module:
        layers = [reference.ConvNormReLU(widths.in_channels, widths.channels, 3), block(widths)]
        return nn.Sequential(*layers, *([nn.Dropout2d(dropout)] if dropout else []))

    return context


def of_channels(module: Callable[[int], nn.Module]) -> Context:
    """A block C -> C that has no other widths."""
    return lambda widths: module(widths.channels)


# ASPP's context is half as wide as the head, as published. 2048 and 512 are everyone's widths.
CONTEXTS: dict[str, Context] = {
    "ISA": isa,
    "SA": behind_conv(base_oc),
    "NL": behind_conv(of_channels(modules.PartitionedNonLocal), dropout=0.1),
    "RCCA": lambda widths: modules.PartitionedRCCAHead(widths.in_channels, widths.channels),
    "CGNL": behind_conv(of_channels(reference.CGNL), dropout=0.1),
    "PPM": lambda widths: reference.PPM(widths.in_channels, widths.channels),
    "ASPP": lambda widths: reference.ASPP(widths.in_channels, widths.channels // 2),
    "none": behind_conv(of_channels(lambda channels: nn.Identity()), dropout=0.1),
}
DENSE_AS_PUBLISHED = behind_conv(partial(base_oc, module=reference.SA))  # with its scores in memory


def head(
    name: str, in_channels: int, channels: int, num_classes: int, partition_size: tuple[int, int] = (8, 8)
) -> nn.Module:
    """A whole head: context and classifier.

    Args:
        name: one of `CONTEXTS`.
        in_channels: width of the backbone's map (2048 for the ResNets of the paper).
        channels: width of the head (512), a multiple of 16.
        num_classes: width of the logits.
        partition_size: (P_h, P_w) of ISA; the others have none.

    x [B, in_channels, H, W] -> logits [B, num_classes, H, W].

    >>> head("RCCA", 64, 16, 19)(torch.randn(2, 64, 9, 13)).shape
    torch.Size([2, 19, 9, 13])
    """
    widths = Widths(in_channels, channels, partition_size)
    return isa_head(widths, num_classes) if name == "ISA" else classified(CONTEXTS[name](widths), num_classes)


def classified(context: nn.Module, num_classes: int) -> nn.Module:
    """A context and its classifier."""
    return nn.Sequential(context, Conv1x1(out_channels(context, "the head"), num_classes, bias=True))
