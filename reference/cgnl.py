"""Compact generalized non-local attention: Yue et al., arXiv 1810.13125, linear in the pixels and without a softmax."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def compact_generalized_attention(t: Tensor, p: Tensor, g: Tensor) -> Tensor:
    """(t p^T) g, computed as t <p, g>: the affinity of all entries is never formed.

    Args:
        t: [B, groups, terms, m], the entries of every group as one vector, m = channels * H * W of t.
        p: [B, groups, terms, n].
        g: [B, groups, 1, n].

    Returns:
        [B, groups, 1, m]; several terms are those of a kernel's expansion and are added up.
    """
    return (p @ g.mT).mT @ t


def gaussian_expansion(x: Tensor, order: int = 3, gamma: float = 1e-4) -> Tensor:
    """[B, groups, 1, n] -> [B, groups, order + 1, n]: of two of them, the sum over terms of products is the kernel

    exp(-2 gamma) * sum_i (2 gamma a b)^i / i!, the Taylor expansion of exp(-gamma |a - b|^2) for unit a and b
    (section 3.3).
    """
    terms = [math.sqrt(math.exp(-2 * gamma) * (2 * gamma) ** i / math.factorial(i)) * x**i for i in range(order + 1)]
    return torch.cat(terms, 2)


class CGNL(nn.Module):
    """The compact generalized non-local block with the dot-product kernel.

    x + GroupNorm(z(t <p, g>)) in every group: theta, phi and g are conv1x1 to C/2 channels, z a grouped conv1x1 back,
    all without bias. The norm starts at zero, so the block starts as the identity.

    Args:
        channels: C.
        groups: C/2 is a multiple of it; 8 as published.

    x [B, C, H, W] -> [B, C, H, W].

    >>> CGNL(16)(torch.randn(2, 16, 5, 7)).shape
    torch.Size([2, 16, 5, 7])
    """

    def __init__(self, channels: int, groups: int = 8) -> None:
        super().__init__()
        self.groups, width = groups, channels // 2
        self.theta, self.phi, self.g = (nn.Conv2d(channels, width, 1, bias=False) for _ in range(3))
        self.output = nn.Conv2d(width, channels, 1, groups=groups, bias=False)
        self.norm = nn.GroupNorm(groups, channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.theta(x), self.phi(x), self.g(x)  # [B, C/2, H, W] each
        t, p, g = (y.reshape(len(x), self.groups, 1, -1) for y in maps)  # [B, groups, 1, C/2/groups H W]
        context = compact_generalized_attention(self.expand(t), self.expand(p), g).view_as(maps[0])
        return self.norm(self.output(context)) + x

    def expand(self, x: Tensor) -> Tensor:
        return x


class CGNLx(CGNL):
    """CGNL with the Gaussian kernel, expanded to third order; shapes as `CGNL`."""

    def expand(self, x: Tensor) -> Tensor:
        return gaussian_expansion(x)
