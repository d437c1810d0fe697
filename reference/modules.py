"""The modules of the paper in plain PyTorch: one self-attention stage, ISA, and the dense baseline.

Structure and padding as the authors published them (openseg.pytorch, `ISA_Module`): feature maps are [B, C, H, W].
Lines [B, C, L] and volumes [B, C, D, H, W], which the paper has not, are the same with convolutions of as many axes.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import (
    dense_attention,
    long_range_attention,
    long_range_groups,
    masked_attention,
    short_range_attention,
    short_range_groups,
)

Size = tuple[int, ...]
CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}  # by the axes of a map
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class ConvNormReLU(nn.Sequential):
    """Convolution without bias that keeps the map's size, batch normalisation, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1, axes: int = 2
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        how: dict[str, Any] = {"padding": padding, "dilation": dilation, "bias": False}
        self.conv: nn.Module = CONVOLUTIONS[axes](in_channels, out_channels, kernel_size, **how)
        self.norm: nn.Module = NORMS[axes](out_channels)
        self.relu = nn.ReLU()


class SelfAttention(nn.Module):
    """One stage: key, query, value and output projections around an attention pattern.

    Args:
        pattern: "long", "short" or "dense".
        padding: "zeros", the map was padded to a multiple of `partition_size`, or "mask", real pixels only.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int,
        pattern: str,
        partition_size: Size = (8, 8),
        padding: str = "zeros",
    ) -> None:
        super().__init__()
        axes = len(partition_size)
        self.pattern, self.partition_size, self.padding = pattern, partition_size, padding

        def twice() -> nn.Sequential:
            widths = (in_channels, key_channels), (key_channels, key_channels)
            return nn.Sequential(*(ConvNormReLU(*each, axes=axes) for each in widths))

        self.query, self.key = twice(), twice()
        self.value = CONVOLUTIONS[axes](in_channels, value_channels, 1, bias=False)
        self.output = ConvNormReLU(value_channels, out_channels, axes=axes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).movedim(1, -1).unsqueeze(-2) for f in (self.query, self.key, self.value))  # [B, H, W, 1, width]
        context = self.attend(q, k, v)
        return self.output(context.squeeze(-2).movedim(-1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.pattern == "dense":
            return dense_attention(q, k, v)
        if self.padding == "zeros":
            attention = long_range_attention if self.pattern == "long" else short_range_attention
            return attention(q, k, v, self.partition_size)
        groups = long_range_groups if self.pattern == "long" else short_range_groups
        return masked_attention(q, k, v, groups, tuple(map(min, self.partition_size, q.shape[1:-2])))


class InterlacedSparseSelfAttention(nn.Module):
    """Long-range attention, then short-range attention, cascaded without a residual; `order` may exchange them.

    Args:
        padding: "zeros" pads the map, centred, to a multiple of P and crops in the end: padded pixels are keys and
            enter batch statistics, as in every published model. "mask" lets no pixel exist outside the map.
    """

    def __init__(
        self,
        in_channels: int,
        key_channels: int,
        value_channels: int,
        out_channels: int,
        partition_size: Size = (8, 8),
        order: str = "long-short",
        padding: str = "zeros",
    ) -> None:
        super().__init__()
        self.partition_size, self.order, self.padding = partition_size, order, padding
        widths = (key_channels, value_channels, out_channels)
        first = in_channels if order == "long-short" else out_channels
        second = out_channels if order == "long-short" else in_channels
        self.long_range = SelfAttention(first, *widths, "long", partition_size, padding)
        self.short_range = SelfAttention(second, *widths, "short", partition_size, padding)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        multiples = self.partition_size if self.padding == "zeros" else (1,) * len(size)
        pads = [-extent % P for extent, P in zip(size, multiples, strict=True)]
        x = F.pad(x, [side for pad in reversed(pads) for side in (pad // 2, pad - pad // 2)])
        stages = [self.long_range, self.short_range]
        for stage in stages if self.order == "long-short" else reversed(stages):
            x = stage(x)
        for dim, (pad, extent) in enumerate(zip(pads, size, strict=True), start=2):
            x = x.narrow(dim, pad // 2, extent)
        return x
