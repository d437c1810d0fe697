"""Where the pixels of a map lie that several devices hold, and how they move from one layout to another.

A layout says which rows and columns each device holds: slabs of rows, whole windows, whole interlaced groups. From one
to another a map goes in one all-to-all of `torch.distributed`, differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

# -- where pixels lie --------------------------------------------------------------------------------------------------


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
    return _widened(cuts, width, lambda begin, end: (begin // P_h * P_h, -(-end // P_h) * P_h))


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
    return tuple(Region(Lines(0, H, P_h, *h), Lines(0, W, P_w, *w)) for h, w in deal((0, P_h), (0, P_w), devices))


Span = tuple[int, int]


@lru_cache(maxsize=256)
def deal(h: Span, w: Span, devices: int) -> tuple[tuple[Span, Span], ...]:
    """A rectangle of residues as one for every device: half of it for half of them, cut across the longer side.

    >>> deal((0, 8), (0, 8), 3)  # 24, 20 and 20 of 64 groups
    (((0, 3), (0, 8)), ((3, 8), (0, 4)), ((3, 8), (4, 8)))
    """
    if devices == 1:
        return ((h, w),)
    some = devices // 2
    if h[1] - h[0] < w[1] - w[0]:
        return tuple((rows, columns) for columns, rows in deal(w, h, devices))
    cut = h[0] + round((h[1] - h[0]) * some / devices)
    return deal((h[0], cut), w, some) + deal((cut, h[1]), w, devices - some)


def even_cuts(lines: int, devices: int) -> tuple[int, ...]:
    """Where DTensor cuts a dimension: shards of ceil(lines / devices), the last ones shorter or empty."""
    shard = -(-lines // devices)
    return tuple(min(i * shard, lines) for i in range(devices + 1))


# -- how pixels move ---------------------------------------------------------------------------------------------------


def exchange(x: Tensor, source: Layout, target: Layout, mesh: DeviceMesh, dim: int) -> Tensor:
    """Moves a map from one layout to another in one all-to-all; where they are the same nothing moves.

    Args:
        x: [B, C, h, w], what `source` gives this device; any strides.
        source: a layout in which no pixel has two owners.
        target: a layout of pixels that `source` has; several devices may want the same.
        mesh, dim: the devices of the layouts are those along this mesh dimension.

    Returns:
        [B, C, h', w'], what `target` gives this device; differentiable. Pixels travel, and arrive, channels last.
    """
    if source == target:
        return x
    B, C = x.shape[:2]
    rank = mesh.get_local_rank(dim)
    plan = _plan(source, target, rank, B)
    pixels = x.permute(2, 0, 3, 1).reshape(-1, C)  # [h B w, C]
    del x  # nobody needs it, mostly, while its copies travel
    pixels = _taken(pixels, plan.send).contiguous()
    pixels = collectives.all_to_all_single(pixels, list(plan.receives), list(plan.sends), (mesh, dim))
    pixels = _taken(pixels, plan.receive)
    return pixels.view(plan.height, B, plan.width, C).permute(1, 3, 0, 2)


def exchanged(source: Layout, target: Layout, rank: int) -> int:
    """How many pixels of one map a device sends to others on the way from one layout to another."""
    if source == target:
        return 0
    plan = _plan(source, target, rank, 1)
    return sum(plan.sends) - plan.sends[rank]


def _taken(pixels: Tensor, index: np.ndarray | None) -> Tensor:
    return pixels if index is None else pixels.index_select(0, torch.tensor(index, device=pixels.device))


class _Plan(NamedTuple):
    """One device's part in an exchange: pixels it sends to and receives from every device, and their orders."""

    sends: tuple[int, ...]
    receives: tuple[int, ...]
    send: np.ndarray | None  # order of sending among the pixels [h, B, w] of the source; None: as they lie
    receive: np.ndarray | None  # order of the target's pixels [h', B, w'] among those received
    height: int
    width: int


@lru_cache(maxsize=32)
def _plan(source: Layout, target: Layout, rank: int, batch: int) -> _Plan:
    sends, send = _shared(source[rank], target, batch)
    receives, receive = _shared(target[rank], source, batch)
    rows, columns = (len(lines.numbers) for lines in target[rank])
    return _Plan(sends, receives, _unless_in_order(send), _unless_in_order(np.argsort(receive)), rows, columns)


def _shared(mine: Region, layout: Layout, batch: int) -> tuple[tuple[int, ...], np.ndarray]:
    """How many of my pixels [h, B, w] each device holds in a layout, and their places, device by device."""
    rows, columns = (lines.numbers for lines in mine)
    entries = np.arange(batch)[:, None]
    places = []
    for theirs in layout:
        h, w = np.flatnonzero(theirs.rows.hold(rows)), np.flatnonzero(theirs.columns.hold(columns))
        places.append(((h[:, None, None] * batch + entries) * len(columns) + w).ravel())
    return tuple(map(len, places)), np.concatenate(places)


def _unless_in_order(index: np.ndarray) -> np.ndarray | None:
    return None if np.array_equal(index, np.arange(len(index))) else index
