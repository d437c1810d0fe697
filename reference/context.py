"""Context without attention: pooling by PSPNet (arXiv 1612.01105) and dilation by DeepLabv3 (arXiv 1706.05587)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .modules import ConvNormReLU


class Pooled(ConvNormReLU):
    """The map averaged to `size` x `size` cells, conv1x1 + BN + ReLU, and bilinearly back to the map."""

    def __init__(self, in_channels: int, out_channels: int, size: int) -> None:
        super().__init__(in_channels, out_channels)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        cells = super().forward(F.adaptive_avg_pool2d(x, self.size))
        return F.interpolate(cells, size=x.shape[2:], mode="bilinear", align_corners=False)


class PPM(nn.Module):
    """The pyramid pooling module: x beside its averages over grids of several sizes, fused by conv3x3 + BN + ReLU.

    Args:
        in_channels, out_channels: widths; 2048 and 512 as published.
        sizes: of the grids; each has in_channels / len(sizes) channels.
        dropout: probability that a channel of the result is dropped in training.

    x [B, in_channels, H, W] -> [B, out_channels, H, W].

    >>> PPM(16, 8)(torch.randn(2, 16, 7, 9)).shape
    torch.Size([2, 8, 7, 9])
    """

    def __init__(
        self, in_channels: int, out_channels: int, sizes: Sequence[int] = (1, 2, 3, 6), dropout: float = 0.1
    ) -> None:
        super().__init__()
        width = in_channels // len(sizes)
        self.branches = nn.ModuleList(Pooled(in_channels, width, size) for size in sizes)
        self.fuse = ConvNormReLU(in_channels + width * len(sizes), out_channels, 3)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fuse(torch.cat([x, *(branch(x) for branch in self.branches)], 1)))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: conv1x1, conv3x3 of several dilations and the mean, fused by conv1x1.

    Every convolution is followed by BN and ReLU.

    Args:
        in_channels, out_channels: widths; 2048 and 256 as published.
        dilations: of the 3x3 convolutions; 12, 24 and 36 at output stride 8.
        dropout: probability that a channel of the result is dropped in training.

    x [B, in_channels, H, W] -> [B, out_channels, H, W].

    >>> ASPP(16, 8)(torch.randn(2, 16, 7, 9)).shape
    torch.Size([2, 8, 7, 9])
    """

    def __init__(
        self, in_channels: int, out_channels: int, dilations: Sequence[int] = (12, 24, 36), dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                ConvNormReLU(in_channels, out_channels),
                *(ConvNormReLU(in_channels, out_channels, 3, dilation) for dilation in dilations),
                Pooled(in_channels, out_channels, 1),
            ]
        )
        self.fuse = ConvNormReLU(out_channels * len(self.branches), out_channels)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fuse(torch.cat([branch(x) for branch in self.branches], 1)))
