"""Attention stages on the rows of a map that this device holds, between exchanges; DTensors stay outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.func import functional_call

from ..maps import attend_maps, make_partition, pads, recomputed
from ..modules import SelfAttention
from .exchange import exchange
from .layouts import Layout, Region, columns, groups, slabs, windows
from .norm import counted_rows, counting


class Shards(NamedTuple):
    """What a layer on local rows knows of the map they are part of: device i of a mesh dimension has a slab of it."""

    mesh: DeviceMesh
    dim: int
    cuts: tuple[int, ...]

    @property
    def devices(self) -> int:
        return self.mesh.size(self.dim)

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank(self.dim)

    @property
    def height(self) -> int:
        return self.cuts[-1]

    @property
    def begin(self) -> int:
        return self.cuts[self.rank]

    @property
    def end(self) -> int:
        return self.cuts[self.rank + 1]


def cascade(stages: Sequence[SelfAttention], shards: Shards, x: Tensor) -> Tensor:
    """Stages one after another on this device's rows x [B, C, h, w], padded once before all of them."""
    (P_h, P_w), (height, width) = stages[0].partition_size, x.shape[2:]
    top = left = 0
    if pads(stages[0].pattern, stages[0].padding):  # rows of padding belong to the first device and to the last
        pad_h, pad_w = -shards.height % P_h, -width % P_w
        first, left = pad_h // 2, pad_w // 2
        top, bottom = first * (shards.rank == 0), (pad_h - first) * (shards.rank == shards.devices - 1)
        x = F.pad(x, (left, pad_w - left, top, bottom)) if pad_h or pad_w else x
        cuts = (0, *(first + cut for cut in shards.cuts[1:-1]), shards.height + pad_h)
        shards = shards._replace(cuts=cuts)
    rows = here = slabs(shards.cuts, x.shape[3])
    for stage, after in zip(stages, (*stages[1:], None), strict=True):
        there = rows if after is None or after.pattern != "local" else windows(shards.cuts, P_h, x.shape[3])
        x = _stage(stage, x, shards, here, there)
        here = there
    return x[:, :, top : top + height, left : left + width]


def _stage(stage: SelfAttention, x: Tensor, shards: Shards, here: Layout, there: Layout) -> Tensor:
    """One stage, from x as it lies `here` to y as it lies `there`: slabs, or the windows they touch."""
    size = shards.height, here[0].columns.end
    rows, grouped = slabs(shards.cuts, size[1]), _group_layout(stage, size, shards)
    query: Any = stage.query[-1]
    K, V = query.conv.out_channels, stage.value.out_channels
    moves_x = stage.value.in_channels + stage.output.conv.out_channels <= 2 * K + 2 * V  # else q, k, v and o

    def own(layout: Layout) -> slice:
        """This device's slab among the rows that a layout gives it, all of which count where no other has them."""
        begin = layout[shards.rank].rows.begin
        return slice(shards.begin - begin, shards.end - begin) if layout == overlapping else slice(None)

    overlapping = grouped if stage.pattern == "local" else there
    if moves_x:
        x, here = exchange(x, here, grouped, shards.mesh, shards.dim), grouped
    with counting(own(here)):
        q, k, v = _project(stage, x)
    del x  # not needed while attention runs
    if here != grouped:
        q, k, v = exchange(torch.cat([q, k, v], 1), here, grouped, shards.mesh, shards.dim).split([K, K, V], 1)
    o = _attend(q, k, v, stage, _local_partition_size(stage, grouped[shards.rank]))
    del q, k, v
    if stage.pattern == "local":
        o, grouped = o[:, :, own(grouped)], rows
    if moves_x:
        return exchange(stage.output(o), grouped, there, shards.mesh, shards.dim)
    o = exchange(o, grouped, there, shards.mesh, shards.dim)
    with counting(own(there)):
        return stage.output(o)


def _group_layout(stage: SelfAttention, size: tuple[int, int], shards: Shards) -> Layout:
    """The layout in which every group of a stage lies on one device."""
    P_h, P_w = stage.partition_size
    layouts: dict[str, Callable[[], Layout]] = {
        "interlaced": lambda: groups(size, (P_h, P_w), shards.devices),
        "local": lambda: windows(shards.cuts, P_h, size[1]),
        "rows": lambda: slabs(shards.cuts, size[1]),
        "columns": lambda: columns(size, shards.devices),
    }
    return layouts[stage.pattern]()


def _local_partition_size(stage: SelfAttention, region: Region) -> tuple[int, int]:
    """The partition size of a stage on the smaller map that a region is."""
    if stage.pattern != "interlaced":
        P_h, P_w = stage.partition_size
        return P_h, P_w
    rows, columns = region
    return rows.last - rows.first, columns.last - columns.first


def _project(stage: SelfAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [B, K, h, w] and v [B, V, h, w]."""
    if stage.recompute and torch.is_grad_enabled():
        q, k = (recomputed(_WithCurrentTensors(layers), x) for layers in (stage.query, stage.key))
        return q, k, stage.value(x)
    return stage.query(x), stage.key(x), stage.value(x)


class _WithCurrentTensors(nn.Module):
    """Layers with the local tensors they have now: when backward computes them again, DTensors are in their place."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = (layers,)  # no child: it is called with other buffers than its own
        self.current_parameters: dict[str, Tensor] = dict(layers.named_parameters())
        self._buffers.update(layers.named_buffers())
        self.rows = counted_rows.get()

    def forward(self, x: Tensor) -> Tensor:
        with counting(self.rows):
            return functional_call(self.layers[0], self.current_parameters | dict(self.named_buffers()), (x,))


def _attend(q: Tensor, k: Tensor, v: Tensor, stage: SelfAttention, step: tuple[int, int]) -> Tensor:
    """Attention [B, V, h, w] on what may be no pixels at all: then that of a batch of no maps, for the graph's sake."""
    B, V, h, w = v.shape
    if h * w > 0:
        return attend_maps(q, k, v, make_partition(stage.pattern, (h, w), step), stage.num_heads, stage._backend)
    q, k, v = (x.reshape(0, x.shape[1], 1, 1) for x in (q, k, v))
    none = attend_maps(q, k, v, make_partition("dense", (1, 1), step), stage.num_heads, stage._backend)
    return none.reshape(B, V, h, w)
