"""The segmentation heads that the paper compares, by name: from a backbone's map to its context, or to logits.

Attention is fused everywhere: dense and criss-cross attention keep no scores in memory either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import reference
from bench import opponents
from isa_triton import ISAHead
from isa_triton.maps import Conv1x1
from isa_triton.models.resnet import out_channels


def behind_conv(block: Callable[[int], nn.Module], dropout: float = 0.0) -> Callable[[int, int], nn.Module]:
    """conv3x3 + BN + ReLU to the head's width, then a block that keeps it, then dropout of channels if there is any."""

    def context(in_channels: int, channels: int) -> nn.Module:
        layers = [reference.ConvNormReLU(in_channels, channels, 3), block(channels)]
        return nn.Sequential(*layers, *([nn.Dropout2d(dropout)] if dropout else []))

    return context


def isa(in_channels: int, channels: int) -> nn.Module:
    """Ours, `ISAHead` before its classifier."""
    head = isa_head(in_channels, channels, num_classes=1)
    return nn.Sequential(head.reduce, head.isa)


def isa_head(in_channels: int, channels: int, num_classes: int, **options: Any) -> ISAHead:
    """Ours with the published ratio of widths: keys half as wide as values."""
    return ISAHead(in_channels, channels, num_classes, key_channels=channels // 2, **options)


def sa(channels: int) -> nn.Module:
    """The authors' dense baseline: keys and values half as wide as the map."""
    return opponents.FusedSA(channels, channels // 2, channels // 2, channels)


# (in_channels, channels) -> a module from x [B, in_channels, H, W] to its context, [B, channels, H, W]; ASPP's is half
# as wide, as published. 2048 and 512 are everyone's widths.
CONTEXTS: dict[str, Callable[[int, int], nn.Module]] = {
    "ISA": isa,
    "SA": behind_conv(sa),
    "NL": behind_conv(opponents.FusedNonLocal, dropout=0.1),
    "RCCA": opponents.FusedRCCAHead,
    "CGNL": behind_conv(reference.CGNL, dropout=0.1),
    "PPM": reference.PPM,
    "ASPP": lambda in_channels, channels: reference.ASPP(in_channels, channels // 2),
    "none": behind_conv(lambda channels: nn.Identity(), dropout=0.1),
}


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
    if name == "ISA":
        return isa_head(in_channels, channels, num_classes, partition_size=partition_size)
    context = CONTEXTS[name](in_channels, channels)
    return nn.Sequential(context, Conv1x1(out_channels(context, name), num_classes, bias=True))
