"""Vectors of length 1, whose inner products are cosines, as `F.normalize` makes them; differentiable to any order."""

from __future__ import annotations

from torch import Tensor

from .contract import lse_dtype

SHORTEST = 1e-12  # what is shorter is divided by this


def normalised(x: Tensor) -> Tensor:
    """x [..., width] / max(|x|, 1e-12), in the dtype of x."""
    return (x * inverse_length(x)).to(x.dtype)


def inverse_length(x: Tensor) -> Tensor:
    """1 / max(|x|, 1e-12), [..., 1], fp32 at least, for halves cannot hold squares."""
    return _inverse(_squares(x))


def pulled_back(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of x, contiguous, from that of `normalised(x)`; 0 where none arrives, whatever x holds there.

    ``(g - y (y . g)) / |x|``, with y of length 1: what points along x changes its length alone.
    """
    squares, g = _squares(x), gradient.to(lse_dtype(x.dtype))
    y = x * _inverse(squares)
    along = (y * g).sum(-1, keepdim=True).masked_fill(squares < SHORTEST**2, 0)
    found = ((g - y * along) * _inverse(squares)).masked_fill(~g.any(-1, keepdim=True), 0)
    return found.to(x.dtype).contiguous()


def _squares(x: Tensor) -> Tensor:
    return x.to(lse_dtype(x.dtype)).square().sum(-1, keepdim=True)  # [..., 1]


def _inverse(squares: Tensor) -> Tensor:
    """Of their roots, which have no derivative at 0."""
    return squares.clamp(min=SHORTEST**2).rsqrt()
