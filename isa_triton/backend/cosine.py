"""Vectors of length 1, whose inner products are cosines, as `F.normalize` makes them; differentiable to any order."""

from __future__ import annotations

from torch import Tensor

from .contract import lse_dtype

SHORTEST = 1e-12  # what is shorter is divided by this


def normalised(x: Tensor) -> Tensor:
    """x [..., width] / max(|x|, 1e-12), in the dtype of x; lengths are fp32, for halves cannot hold their squares."""
    wide = x.to(lse_dtype(x.dtype))
    return (wide * _inverse_length(_squares(wide))).to(x.dtype)


def pulled_back(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of x, contiguous, from that of `normalised(x)`; 0 where none arrives, whatever x holds there.

    ``(g - y (y . g)) / |x|``, with y of length 1: what points along x changes its length alone.
    """
    wide, g = (t.to(lse_dtype(x.dtype)) for t in (x, gradient))
    squares = _squares(wide)
    inverse = _inverse_length(squares)
    y = wide * inverse
    along = (y * g).sum(-1, keepdim=True).masked_fill(squares < SHORTEST**2, 0)
    found = ((g - y * along) * inverse).masked_fill(~g.any(-1, keepdim=True), 0)
    return found.to(x.dtype).contiguous()


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True)  # [..., 1]


def _inverse_length(squares: Tensor) -> Tensor:
    """Of the squares: lengths have no derivative at 0."""
    return squares.clamp(min=SHORTEST**2).rsqrt()
