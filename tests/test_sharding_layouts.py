"""Where the pixels of a map are, layout by layout: every pixel somewhere, groups together, dealt out evenly."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import numpy as np
import pytest

from isa_triton import Partition
from isa_triton.sharding.layouts import columns, even_cuts, groups, halo, slabs, split_residues, windows


def pixels(region: Any) -> set[tuple[int, int]]:
    rows, columns = (lines.numbers.tolist() for lines in region)
    return set(product(rows, columns))


@pytest.mark.parametrize("devices", [1, 2, 3, 5, 16])
def test_layouts_cover_the_map_and_groups_stay_together(devices: int) -> None:
    size, P = (13, 10), (4, 3)
    everywhere = set(product(range(13), range(10)))
    cuts = even_cuts(13, devices)
    for layout in (slabs(cuts, 10), columns(size, devices), groups(size, P, devices)):
        parts = [pixels(region) for region in layout]
        assert set().union(*parts) == everywhere
        assert sum(map(len, parts)) == len(everywhere)
    for slab, window, wide in zip(slabs(cuts, 10), windows(cuts, 4, 10), halo(cuts, 1, 10), strict=True):
        assert pixels(slab) <= pixels(window) & pixels(wide)
        assert {y // 4 for y, _ in pixels(slab)} == {y // 4 for y, _ in pixels(window)}
    whole = Partition.interlaced(size, stride=P)
    for rows, lines in groups(size, P, devices):
        if not pixels((rows, lines)):
            continue
        step = rows.last - rows.first, lines.last - lines.first
        size_here = len(rows.numbers), len(lines.numbers)
        part = Partition.interlaced(size_here, stride=(min(step[0], size_here[0]), min(step[1], size_here[1])))
        here = np.array([[whole.seat(y, x)[0] for x in lines.numbers] for y in rows.numbers])
        seats = np.array([[part.seat(y, x)[0] for x in range(size_here[1])] for y in range(size_here[0])])
        assert (
            len(set(zip(here.ravel(), seats.ravel(), strict=True))) == len(set(here.ravel())) == len(set(seats.ravel()))
        )


@pytest.mark.parametrize("devices", range(1, 65))
def test_groups_are_dealt_out_evenly(devices: int) -> None:
    shares = [(h[1] - h[0]) * (w[1] - w[0]) for h, w in split_residues((0, 8), (0, 8), devices)]
    assert len(shares) == devices
    assert sum(shares) == 64
    assert max(shares) <= 2 * math.ceil(64 / devices)
    if 64 % devices == 0:
        assert set(shares) == {64 // devices}
