"""Bilinear interpolation of a map one dimension at a time, so that rows may come from several devices."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Samples(NamedTuple):
    """Where the lines of an interpolated map lie: between line `low` and the next, nearer to that by `weight`."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray


def sample_lines(lines: int, wanted: int, align_corners: bool) -> Samples:
    if align_corners:
        places = np.arange(wanted) * ((lines - 1) / max(wanted - 1, 1))
    else:
        places = ((np.arange(wanted) + 0.5) * (lines / wanted) - 0.5).clip(0)
    low = np.minimum(places.astype(np.int64), lines - 1)
    return Samples(low, np.minimum(low + 1, lines - 1), places - low)


def interpolated(x: Tensor, dim: int, samples: Samples) -> Tensor:
    """Lines of x [B, C, H, W] between its own, along one dimension."""
    low, high = (torch.tensor(index, device=x.device) for index in (samples.low, samples.high))
    weight = torch.tensor(samples.weight, device=x.device, dtype=x.dtype).view((-1, 1) if dim == 2 else (-1,))
    return torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)
