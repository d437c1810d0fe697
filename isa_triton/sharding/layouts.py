"""Where the pixels of a map lie that several devices hold.

A layout says which rows and columns each device holds: slabs of rows, whole windows, whole interlaced groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..axis import ceil_div


@dataclass(frozen=True)
class Lines:
    """Rows or columns of a map: those of [begin, end) whose residue modulo `period` lies in [first, last)."""

    begin: int
    end: int
    period: int = 1
    first: int = 0
    last: int = 1

    @property
    def numbers(self) -> np.ndarray:
        """The lines themselves, ascending."""
        lines = np.arange(self.begin, self.end)
        return lines[self.hold(lines)]

    def hold(self, lines: np.ndarray) -> np.ndarray:
        """Which of some lines are among these."""
        residues = lines % self.period
        return (self.begin <= lines) & (lines < self.end) & (self.first <= residues) & (residues < self.last)


class Region(NamedTuple):
    """The pixels that one device holds: where these rows and these columns cross."""

    rows: Lines
    columns: Lines


Layout = tuple[Region, ...]  # who holds which pixels of a map, a region for every device


def slabs(cuts: Sequence[int], width: int) -> Layout:
    """Device i holds the rows [cuts[i], cuts[i + 1])."""
    return tuple(Region(Lines(begin, end), Lines(0, width)) for begin, end in pairwise(cuts))


def columns(size: tuple[int, int], devices: int) -> Layout:
    """Whole columns, as many for each device as for every other."""
    return tuple(Region(rows, lines) for lines, rows in slabs(even_cuts(size[1], devices), size[0]))


def windows(cuts: Sequence[int], P_h: int, width: int) -> Layout:
    """Every window of P_h rows that the slabs of `cuts` touch, as a whole: a window across a cut has several owners."""
    return _widened(cuts, width, lambda begin, end: (begin // P_h * P_h, ceil_div(end, P_h) * P_h))


def halo(cuts: Sequence[int], reach: int, width: int) -> Layout:
    """The slabs of `cuts` with `reach` more rows on either side."""
    return _widened(cuts, width, lambda begin, end: (begin - reach, end + reach))


def _widened(cuts: Sequence[int], width: int, widen: Callable[[int, int], tuple[int, int]]) -> Layout:
    """Slabs with more rows of the map; what has no rows of its own needs none of others."""
    regions = []
    for begin, end in pairwise(cuts):
        first, last = widen(begin, end) if begin < end else (begin, end)
        regions.append(Region(Lines(max(0, first), min(last, cuts[-1])), Lines(0, width)))
    return tuple(regions)


def groups(size: tuple[int, int], partition_size: tuple[int, int], devices: int) -> Layout:
    """Whole interlaced groups, about as many for each device as for every other."""
    (H, W), (P_h, P_w) = size, partition_size
    return tuple(
        Region(Lines(0, H, P_h, *h), Lines(0, W, P_w, *w)) for h, w in split_residues((0, P_h), (0, P_w), devices)
    )


Span = tuple[int, int]


@lru_cache(maxsize=256)
def split_residues(h: Span, w: Span, devices: int) -> tuple[tuple[Span, Span], ...]:
    """A rectangle of residues as one for every device: half of it for half of them, cut across the longer side.

    >>> split_residues((0, 8), (0, 8), 3)  # 24, 20 and 20 of 64 groups
    (((0, 3), (0, 8)), ((3, 8), (0, 4)), ((3, 8), (4, 8)))
    """
    if devices == 1:
        return ((h, w),)
    some = devices // 2
    if h[1] - h[0] < w[1] - w[0]:
        return tuple((rows, columns) for columns, rows in split_residues(w, h, devices))
    cut = h[0] + round((h[1] - h[0]) * some / devices)
    return split_residues((h[0], cut), w, some) + split_residues((cut, h[1]), w, devices - some)


def even_cuts(lines: int, devices: int) -> tuple[int, ...]:
    """Where DTensor cuts a dimension: shards of ceil(lines / devices), the last ones shorter or empty."""
    shard = ceil_div(lines, devices)
    return tuple(min(i * shard, lines) for i in range(devices + 1))
