"""How the pixels of a map move from one layout to another: in one all-to-all of `torch.distributed`, differentiable."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

from .layouts import Layout, Region


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
    pixels = _select(pixels, plan.send).contiguous()
    pixels = collectives.all_to_all_single(pixels, list(plan.receives), list(plan.sends), (mesh, dim))
    pixels = _select(pixels, plan.receive)
    return pixels.view(plan.height, B, plan.width, C).permute(1, 3, 0, 2)


def exchanged(source: Layout, target: Layout, rank: int) -> int:
    """How many pixels of one map a device sends to others on the way from one layout to another."""
    if source == target:
        return 0
    plan = _plan(source, target, rank, 1)
    return sum(plan.sends) - plan.sends[rank]


def _select(pixels: Tensor, index: np.ndarray | None) -> Tensor:
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
    return _Plan(sends, receives, _order_or_none(send), _order_or_none(np.argsort(receive)), rows, columns)


def _shared(mine: Region, layout: Layout, batch: int) -> tuple[tuple[int, ...], np.ndarray]:
    """How many of my pixels [h, B, w] each device holds in a layout, and their places, device by device."""
    rows, columns = (lines.numbers for lines in mine)
    entries = np.arange(batch)[:, None]
    places = []
    for theirs in layout:
        h, w = np.flatnonzero(theirs.rows.hold(rows)), np.flatnonzero(theirs.columns.hold(columns))
        places.append(((h[:, None, None] * batch + entries) * len(columns) + w).ravel())
    return tuple(map(len, places)), np.concatenate(places)


def _order_or_none(index: np.ndarray) -> np.ndarray | None:
    return None if np.array_equal(index, np.arange(len(index))) else index
