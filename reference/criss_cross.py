"""Criss-cross attention: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", arXiv 1811.11721."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .modules import ConvNormReLU


def criss_cross_attention(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0) -> Tensor:
    """Every pixel attends its row and its column under one softmax over H + W - 1 pixels, itself counted once.

    q, k [B, H, W, heads, K], v [B, H, W, heads, V] -> [B, H, W, heads, V]; the paper does not scale its scores.
    """
    H, W = q.shape[1:3]
    row = scale * torch.einsum("bywnc,byxnc->bywnx", q, k)  # [B, H, W, heads, W]
    column = scale * torch.einsum("bhxnc,byxnc->bhxny", q, k)  # [B, H, W, heads, H]
    itself = torch.eye(H, dtype=torch.bool, device=q.device)[:, None, None]  # [H, 1, 1, H]
    column = column.masked_fill(itself, -torch.inf)  # the row has it
    affinity = torch.softmax(torch.cat([row, column], -1), -1)
    row, column = affinity.split([W, H], -1)
    return torch.einsum("bywnx,byxnc->bywnc", row, v) + torch.einsum("bhxny,byxnc->bhxnc", column, v)


class RCCA(nn.Module):
    """Recurrent criss-cross attention: gamma * context + x, over again with the same weights.

    After two rounds every pixel has seen every pixel. gamma starts at 0, so the block starts as the identity.

    Args:
        channels: C, the width of the map and of the values.
        key_channels: width of query and key; default C/8, as published.
        recurrence: how often attention is applied.

    x [B, C, H, W] -> [B, C, H, W].

    >>> RCCA(16)(torch.randn(2, 16, 5, 7)).shape
    torch.Size([2, 16, 5, 7])
    """

    def __init__(self, channels: int, key_channels: int | None = None, recurrence: int = 2) -> None:
        super().__init__()
        key_channels = channels // 8 if key_channels is None else key_channels
        self.recurrence = recurrence
        self.query, self.key = nn.Conv2d(channels, key_channels, 1), nn.Conv2d(channels, key_channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.recurrence):
            q, k, v = (f(x).permute(0, 2, 3, 1).unsqueeze(3) for f in (self.query, self.key, self.value))
            x = self.gamma * self.attend(q, k, v).squeeze(3).permute(0, 3, 1, 2) + x
        return x

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return criss_cross_attention(q, k, v)


class RCCAHead(nn.Module):
    """CCNet's segmentation head before its classifier: conv3x3, RCCA, conv3x3, fused with the input by a conv3x3.

    Args:
        in_channels: width of the backbone's map (2048 as published).
        channels: width of everything after (512).
        dropout: probability that a channel of the result is dropped in training.

    x [B, in_channels, H, W] -> [B, channels, H, W].

    >>> RCCAHead(32, 16)(torch.randn(2, 32, 5, 7)).shape
    torch.Size([2, 16, 5, 7])
    """

    def __init__(self, in_channels: int, channels: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.reduce, self.attention = ConvNormReLU(in_channels, channels, 3), RCCA(channels)
        self.output = ConvNormReLU(channels, channels, 3)
        self.fuse, self.dropout = ConvNormReLU(in_channels + channels, channels, 3), nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        context = self.output(self.attention(self.reduce(x)))
        return self.dropout(self.fuse(torch.cat([x, context], 1)))
