"""Vectors of length 1, whose inner products are cosines, as `F.normalize` makes them."""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import lse_dtype

SHORTEST = 1e-12  # what is shorter is divided by this


def normalised(x: Tensor) -> Tensor:
    """x [..., width] / max(|x|, 1e-12), in the dtype of x, differentiable to any order: lengths are not, at 0."""
    squares = x.to(lse_dtype(x.dtype)).square().sum(-1, keepdim=True)
    return (x * squares.clamp(min=SHORTEST**2).rsqrt()).to(x.dtype)


def inverse_length(x: Tensor) -> Tensor:
    """1 / max(|x|, 1e-12), [..., 1], fp32 at least, for halves cannot hold squares."""
    return _length(x).clamp(min=SHORTEST).reciprocal()


def pulled_back(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of x, contiguous, from that of y = `normalised(x)`; and ``y . g``, [..., 1].

    ``(g - y (y . g)) / |x|``, but of what is shorter than 1e-12: what points along x changes its length alone.
    """
    length = _length(x)
    inverse = length.clamp(min=SHORTEST).reciprocal()
    along = (x * g).sum(-1, keepdim=True, dtype=length.dtype) * inverse
    found = g - x * (along.masked_fill(length < SHORTEST, 0) * inverse)
    return found.mul_(inverse).to(x.dtype).contiguous(), along


def _length(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=lse_dtype(x.dtype))
