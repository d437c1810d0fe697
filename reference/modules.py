"""The modules of the paper in plain PyTorch: one self-attention stage, ISA, and the dense baseline.

Structure and padding as the authors published them (openseg.pytorch, `ISA_Module`): feature maps are [B, C, H, W].
"""

from __future__ import annotations

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


class ConvNormReLU(nn.Sequential):
    """Convolution without bias that keeps the map's size, batch normalisation, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
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
        partition_size: tuple[int, int] = (8, 8),
        padding: str = "zeros",
    ) -> None:
        super().__init__()
        self.pattern, self.partition_size, self.padding = pattern, partition_size, padding

        def twice() -> nn.Sequential:
            return nn.Sequential(ConvNormReLU(in_channels, key_channels), ConvNormReLU(key_channels, key_channels))

        self.query, self.key = twice(), twice()
        self.value = nn.Conv2d(in_channels, value_channels, 1, bias=False)
        self.output = ConvNormReLU(value_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).permute(0, 2, 3, 1).unsqueeze(3) for f in (self.query, self.key, self.value))  # [B, H, W, 1, .]
        context = self.attend(q, k, v)
        return self.output(context.squeeze(3).permute(0, 3, 1, 2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.pattern == "dense":
            return dense_attention(q, k, v)
        if self.padding == "zeros":
            attention = long_range_attention if self.pattern == "long" else short_range_attention
            return attention(q, k, v, self.partition_size)
        groups = long_range_groups if self.pattern == "long" else short_range_groups
        P_h, P_w = self.partition_size
        return masked_attention(q, k, v, groups, (min(P_h, q.shape[1]), min(P_w, q.shape[2])))


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
        partition_size: tuple[int, int] = (8, 8),
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
        H, W = x.shape[2:]
        low_h = low_w = 0
        if self.padding == "zeros":
            pad_h, pad_w = (-H) % self.partition_size[0], (-W) % self.partition_size[1]
            low_h, low_w = pad_h // 2, pad_w // 2
            x = F.pad(x, (low_w, pad_w - low_w, low_h, pad_h - low_h))
        stages = [self.long_range, self.short_range]
        for stage in stages if self.order == "long-short" else reversed(stages):
            x = stage(x)
        return x[:, :, low_h : low_h + H, low_w : low_w + W]
