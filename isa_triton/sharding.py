"""One map over several devices: every device holds some of its rows, and attention still reaches every pixel.

Whatever acts on single pixels stays where the rows lie. Windows never cross a cut at a multiple of P_h. Interlaced
groups do not depend on each other, so each goes to one device as a whole: one all-to-all before long-range attention,
one after it. Groups are dealt out by the residues of their rows and columns,

    device = the owner of (y mod P_h, x mod P_w),    which owns residues [a, b) x [c, d),

and the pixels of such a rectangle of residues, in the order in which they lie, are a smaller map whose interlaced
partition has the stride (b - a, d - c): attention runs there unchanged (Huang et al., arXiv 1907.12273, section 3.2).

Everything rests on `torch.distributed`: maps and parameters are DTensors, exchanges are functional collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement
from torch.func import functional_call
from torch.nn.utils.stateless import _reparametrize_module

from .exchange import Layout, Lines, Region, columns, even_cuts, exchange, groups, halo, slabs, windows
from .modules import (
    Conv1x1,
    ConvNormReLU,
    InterlacedSparseSelfAttention,
    ISAHead,
    ISAModule,
    SelfAttention2d,
    attend_maps,
    check_map,
    make_partition,
    pads,
    recomputed,
)

# -- layers on shards --------------------------------------------------------------------------------------------------


class MapParallel(ParallelStyle):
    """Spreads the rows of a map over one dimension of a device mesh, for `parallelize_module`.

    `SelfAttention2d`, `InterlacedSparseSelfAttention`, `ISAModule` and `ISAHead` then take and return DTensors
    [B, C, H, W] that are `Shard(2)` along `rows`, and `Shard(0)` (the batch) along every other mesh dimension. They
    compute what they compute on one device: outputs, gradients, batch statistics. Parameters and buffers become
    replicated DTensors with the values of the first device; gradients of parameters arrive summed over the mesh.

    The two stages in their published order exchange the map exactly twice in forward and twice in backward. Windows
    that lie across a cut between shards are computed on both sides of it (there are none where the number of devices
    times P_h divides H), which the other order, short range first, pays with a third exchange. What moves is x and y,
    C + C_out channels a pixel, or where they are fewer q, k, v and o, 2 K + 2 V.

    Args:
        rows: the mesh dimension, by name or number, that shards H.

    Raises:
        TypeError: (parallelize_module) a module of another kind, or with a part that does not act per pixel and cannot
            be shared; (forward) x is no DTensor.
        ValueError: (parallelize_module) the mesh has no such dimension, or a stage's pattern is "dense"; (forward) x is
            on another mesh, placed otherwise or of another shape, or shards do not fit together. Devices compare what
            they hold when a layer meets a shape or dtype for the first time, so all of them raise, before any map
            moves.
        RuntimeError: (of `torch.distributed`, in forward or backward) another device died, raised, or took longer than
            the timeout of the process group.

    >>> mesh = init_device_mesh("cuda", (8,))  # doctest: +SKIP
    >>> layer = parallelize_module(InterlacedSparseSelfAttention(64, 32, 64), mesh, MapParallel())  # doctest: +SKIP
    >>> y = layer(distribute_tensor(x, mesh, [Shard(2)]))  # doctest: +SKIP
    """

    def __init__(self, rows: int | str = 0) -> None:
        super().__init__()
        self.rows = rows

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        names = device_mesh.mesh_dim_names or ()
        dim = names.index(self.rows) if self.rows in names else self.rows
        if not isinstance(dim, int) or not 0 <= dim < device_mesh.ndim:
            valid = [*range(device_mesh.ndim), *map(repr, names)]
            raise ValueError(f"rows must be a dimension of the mesh, {', '.join(map(str, valid))}, got {self.rows!r}")
        _check(module)
        _spread(module, device_mesh, dim)
        for part in module.modules():
            _replicate(part, device_mesh, self.src_data_rank)
        return module


class _Shards(NamedTuple):
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


class _OnShards(nn.Module):
    """A layer between DTensors; what it does to local rows, with local parameters, is `local`."""

    mesh: DeviceMesh
    dim: int
    agreed: set[Any]  # the shapes that all devices are known to share

    def forward(self, *maps: Any) -> DTensor:
        for x in maps:
            self.meet(x, self.expected_channels if len(maps) == 1 else None)
        shards = _Shards(self.mesh, self.dim, even_cuts(maps[0].shape[2], self.mesh.size(self.dim)))
        summed = [Partial()] * self.mesh.ndim  # every device has its pixels' part of a parameter's gradient
        lent: dict[str, Any] = dict(self.named_buffers()) | dict(self.named_parameters())
        lent = {
            name: x.redistribute(placements=x.placements).to_local(grad_placements=summed) for name, x in lent.items()
        }
        with _reparametrize_module(self, lent):  # functional_call would call forward, which this is
            y = self.local(shards, *(x.to_local() for x in maps))
        return _joined(y, shards, batch=len(maps[0]))

    def meet(self, x: Any, channels: int | None) -> None:
        """Raises where x is not what the layer takes; where its like is met first, on all devices if on one of them."""
        key = problem = None
        try:
            _check_map(x, self.mesh, self.dim, channels)
            key = x.shape, x.to_local().shape, x.dtype
            if key in self.agreed:
                return
            _check_shard(x, self.mesh, self.dim)
        except (TypeError, ValueError) as error:
            if key is None and self.agreed:
                raise  # the others may have met theirs, and do not ask
            problem = error
        agreed = _agree(x if problem is None else None, self.mesh)
        if problem is not None:
            raise problem
        if not agreed:
            raise ValueError(f"x must be one map, got shape {tuple(x.shape)}, {x.dtype} here and another elsewhere")
        self.agreed.add(key)

    @property
    def expected_channels(self) -> int | None:
        """Width of the layer's input, where it has to have one."""
        return None

    def local(self, shards: _Shards, *maps: Tensor) -> Tensor:
        """The layer on this device's rows: per pixel, the layer as it was."""
        return super().forward(*maps)


def _joined(y: Tensor, shards: _Shards, batch: int) -> DTensor:
    """The map [batch, C, H, W] of which every device has rows y."""
    C, H, W = y.shape[1], shards.height, y.shape[3]
    shape, stride = torch.Size((batch, C, H, W)), (H * W * C, 1, W * C, C)
    placements = _placements(shards.mesh, shards.dim)
    return DTensor.from_local(y, shards.mesh, placements, run_check=False, shape=shape, stride=stride)


def _placements(mesh: DeviceMesh, dim: int) -> list[Placement]:
    """Rows along one dimension of the mesh, the batch along all others."""
    return [Shard(2) if i == dim else Shard(0) for i in range(mesh.ndim)]


class ShardedConv1x1(_OnShards, Conv1x1):
    """`Conv1x1` between DTensors."""

    @property
    def expected_channels(self) -> int:
        return self.in_channels


class ShardedConvNormReLU(_OnShards, ConvNormReLU):
    """`ConvNormReLU` between DTensors. A convolution over several rows first fetches those beyond its cuts."""

    @property
    def expected_channels(self) -> int:
        return self.conv.in_channels

    def local(self, shards: _Shards, *maps: Tensor) -> Tensor:
        reach = _reach(self.conv)
        if reach == 0:
            return super().local(shards, *maps)
        (x,) = maps
        x = exchange(x, slabs(shards.cuts, x.shape[3]), halo(shards.cuts, reach, x.shape[3]), shards.mesh, shards.dim)
        top, bottom = max(0, reach - shards.begin), max(0, reach - (shards.height - shards.end))  # outside the map
        empty = shards.begin == shards.end
        if empty:  # a convolution wants pixels, a graph that is the same everywhere wants a convolution: of no map
            top, bottom, B = 2 * reach + 1, 0, len(x)
            x = x[:0]
        conv, padding_w = self.conv, int(self.conv.padding[1])
        x = F.pad(x, (0, 0, top, bottom))
        y = F.conv2d(x, conv.weight, conv.bias, 1, (0, padding_w), conv.dilation, conv.groups)
        if empty:
            y = y.reshape(B, y.shape[1], 0, y.shape[3])
        return self.relu(self.norm(y))


class ShardedDropout2d(_OnShards, nn.Dropout2d):
    """`Dropout2d` between DTensors: a channel is dropped on the whole map, as the first device's dice say."""

    def local(self, shards: _Shards, *maps: Tensor) -> Tensor:
        (x,) = maps
        if not self.training or self.p == 0:
            return x
        kept = F.dropout2d(x.new_ones(*x.shape[:2], 1, 1), self.p) * (shards.rank == 0)
        return x * collectives.all_reduce(kept, "sum", (shards.mesh, shards.dim))


class ShardedBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` on local pixels with the statistics of all pixels on the mesh.

    torch's SyncBatchNorm refuses CPU tensors; elsewhere, too, this one keeps nothing but its input for backward.
    """

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = x.new_ones(x.shape[1], dtype=dtype) if self.weight is None else self.weight
        bias = x.new_zeros(x.shape[1], dtype=dtype) if self.bias is None else self.bias
        y, mean, var, n = _BatchNorm.apply(x, weight, bias, self.eps, self.mesh, _counted.get())
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._remember(mean, var * (n / (n - 1)))
        return y

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        for running, value in ((self.running_mean, mean), (self.running_var, var)):
            assert running is not None
            running.add_((value.to(running.dtype) - running) * factor)


_counted: ContextVar[slice] = ContextVar("_counted", default=slice(None))  # rows that enter batch statistics here


@contextmanager
def _counting(rows: slice) -> Iterator[None]:
    """Rows that this device has beside others, which count them, do not enter batch statistics a second time."""
    token = _counted.set(rows)
    try:
        yield
    finally:
        _counted.reset(token)


class _BatchNorm(torch.autograd.Function):
    """Batch normalisation with the statistics of the counted rows of all devices.

    x [B, C, h, w] -> y, and mean [C], variance (biased) [C] and the number of pixels [1] beside it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, mesh: DeviceMesh, rows: slice
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        mine = x[:, :, rows]
        pixels = mine.numel() // mine.shape[1]
        var, here = torch.zeros(2, mine.shape[1], dtype=dtype, device=x.device)
        if pixels:  # in one pass, centred: sums of squares would cancel where the mean is large
            var, here = torch.var_mean(mine.to(dtype), (0, 2, 3), correction=0)
        *sums, n = _sum(torch.cat([pixels * here, here.new_tensor([pixels])]), mesh).split([len(here), 1])
        mean = sums[0] / n
        var = _sum(pixels * (var + (here - mean) ** 2), mesh) / n
        ctx.save_for_backward(x, weight, mean, var, n)
        ctx.eps, ctx.mesh, ctx.rows = eps, mesh, rows
        ctx.mark_non_differentiable(mean, var, n)
        ctx.set_materialize_grads(False)
        return F.batch_norm(x, mean, var, weight.to(dtype), bias.to(dtype), False, 0.0, eps), mean, var, n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, n = ctx.saved_tensors
        scale = weight.to(mean.dtype)
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(  # as if mean and var were constants
            dy, x, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        # dx = weight / std (dy - mean(dy) - x_hat mean(dy x_hat)), the first term is there, the others where counted
        dy_x_hat, dy_sum = (_sum(torch.cat([dweight, dbias]), ctx.mesh) / n).chunk(2)
        std = (var + ctx.eps).sqrt()
        slope = scale / std * dy_x_hat / std
        offset = scale / std * dy_sum - slope * mean
        offset, slope = (term.to(x.dtype).view(-1, 1, 1) for term in (offset, slope))
        dx[:, :, ctx.rows].sub_(offset).addcmul_(x[:, :, ctx.rows], slope, value=-1)
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None


def _sum(x: Tensor, mesh: DeviceMesh) -> Tensor:
    for dim in range(mesh.ndim):
        x = collectives.wait_tensor(collectives.all_reduce(x, "sum", (mesh, dim)))
    return x


class ShardedSelfAttention2d(_OnShards, SelfAttention2d):
    """`SelfAttention2d` between DTensors."""

    @property
    def expected_channels(self) -> int:
        return self.value.in_channels

    def local(self, shards: _Shards, *maps: Tensor) -> Tensor:
        return _cascade((self,), shards, *maps)


class ShardedInterlacedSparseSelfAttention(_OnShards, InterlacedSparseSelfAttention):
    """`InterlacedSparseSelfAttention` between DTensors."""

    @property
    def expected_channels(self) -> int:
        return self.stages[0].value.in_channels

    def local(self, shards: _Shards, *maps: Tensor) -> Tensor:
        return _cascade(self.stages, shards, *maps)


class ShardedISAHead(ISAHead):
    """`ISAHead` between DTensors: its parts are sharded themselves, upsampling joins rows across the cuts."""

    mesh: DeviceMesh
    dim: int

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        logits: Any = super().forward(x)
        if size is None:
            return logits
        (B, _, H, W), devices = logits.shape, self.mesh.size(self.dim)
        shards = _Shards(self.mesh, self.dim, even_cuts(size[0], devices))
        rows, columns = (_samples(n, wanted, self.align_corners) for n, wanted in ((H, size[0]), (W, size[1])))
        needed = tuple(
            Region(Lines(rows.low[begin], rows.high[end - 1] + 1) if begin < end else Lines(0, 0), Lines(0, W))
            for begin, end in pairwise(shards.cuts)
        )
        y = exchange(logits.to_local(), slabs(even_cuts(H, devices), W), needed, self.mesh, self.dim)
        mine = _Samples(*(values[shards.begin : shards.end] for values in rows))
        first = needed[shards.rank].rows.begin
        y = _interpolated(y, 2, mine._replace(low=mine.low - first, high=mine.high - first))
        return _joined(_interpolated(y, 3, columns), shards, batch=B)


class _Samples(NamedTuple):
    """Where the lines of an interpolated map lie: between line `low` and the next, nearer to that by `weight`."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray


def _samples(lines: int, wanted: int, align_corners: bool) -> _Samples:
    if align_corners:
        places = np.arange(wanted) * ((lines - 1) / max(wanted - 1, 1))
    else:
        places = ((np.arange(wanted) + 0.5) * (lines / wanted) - 0.5).clip(0)
    low = np.minimum(places.astype(np.int64), lines - 1)
    return _Samples(low, np.minimum(low + 1, lines - 1), places - low)


def _interpolated(x: Tensor, dim: int, samples: _Samples) -> Tensor:
    """Lines of x [B, C, H, W] between its own, along one dimension."""
    low, high = (torch.tensor(index, device=x.device) for index in (samples.low, samples.high))
    weight = torch.tensor(samples.weight, device=x.device, dtype=x.dtype).view((-1, 1) if dim == 2 else (-1,))
    return torch.lerp(x.index_select(dim, low), x.index_select(dim, high), weight)


def _cascade(stages: Sequence[SelfAttention2d], shards: _Shards, x: Tensor) -> Tensor:
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


def _stage(stage: SelfAttention2d, x: Tensor, shards: _Shards, here: Layout, there: Layout) -> Tensor:
    """One stage, from x as it lies `here` to y as it lies `there`: slabs, or the windows they touch."""
    size = shards.height, here[0].columns.end
    rows, seats = slabs(shards.cuts, size[1]), _seats(stage, size, shards)
    query: Any = stage.query[-1]
    K, V = query.conv.out_channels, stage.value.out_channels
    moves_x = stage.value.in_channels + stage.output.conv.out_channels <= 2 * K + 2 * V  # else q, k, v and o

    def own(layout: Layout) -> slice:
        """This device's slab among the rows that a layout gives it, all of which count where no other has them."""
        begin = layout[shards.rank].rows.begin
        return slice(shards.begin - begin, shards.end - begin) if layout == overlapping else slice(None)

    overlapping = seats if stage.pattern == "local" else there
    if moves_x:
        x, here = exchange(x, here, seats, shards.mesh, shards.dim), seats
    with _counting(own(here)):
        q, k, v = _project(stage, x)
    del x  # not needed while attention runs
    if here != seats:
        q, k, v = exchange(torch.cat([q, k, v], 1), here, seats, shards.mesh, shards.dim).split([K, K, V], 1)
    o = _attend(q, k, v, stage, _step(stage, seats[shards.rank]))
    del q, k, v
    if stage.pattern == "local":
        o, seats = o[:, :, own(seats)], rows
    if moves_x:
        return exchange(stage.output(o), seats, there, shards.mesh, shards.dim)
    o = exchange(o, seats, there, shards.mesh, shards.dim)
    with _counting(own(there)):
        return stage.output(o)


def _seats(stage: SelfAttention2d, size: tuple[int, int], shards: _Shards) -> Layout:
    """The layout in which every group of a stage lies on one device."""
    layouts: dict[str, Callable[[], Layout]] = {
        "interlaced": lambda: groups(size, stage.partition_size, shards.devices),
        "local": lambda: windows(shards.cuts, stage.partition_size[0], size[1]),
        "rows": lambda: slabs(shards.cuts, size[1]),
        "columns": lambda: columns(size, shards.devices),
    }
    return layouts[stage.pattern]()


def _step(stage: SelfAttention2d, region: Region) -> tuple[int, int]:
    """The partition size of a stage on the smaller map that a region is."""
    if stage.pattern != "interlaced":
        return stage.partition_size
    rows, columns = region
    return rows.last - rows.first, columns.last - columns.first


def _project(stage: SelfAttention2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [B, K, h, w] and v [B, V, h, w]."""
    if stage.recompute and torch.is_grad_enabled():
        return recomputed(_Kept(stage.query), x), recomputed(_Kept(stage.key), x), stage.value(x)
    return stage.query(x), stage.key(x), stage.value(x)


class _Kept(nn.Module):
    """Layers that keep what is lent to them now: when backward computes them again, it has been given back."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = (layers,)  # no child: it is called with other buffers than its own
        self.parameters_lent: dict[str, Tensor] = dict(layers.named_parameters())
        self._buffers.update(layers.named_buffers())
        self.rows = _counted.get()

    def forward(self, x: Tensor) -> Tensor:
        with _counting(self.rows):
            return functional_call(self.layers[0], self.parameters_lent | dict(self.named_buffers()), (x,))


def _attend(q: Tensor, k: Tensor, v: Tensor, stage: SelfAttention2d, step: tuple[int, int]) -> Tensor:
    """Attention [B, V, h, w] on what may be no pixels at all: then that of a batch of no maps, for the graph's sake."""
    B, V, h, w = v.shape
    if h * w > 0:
        return attend_maps(q, k, v, make_partition(stage.pattern, (h, w), step), stage.backend)
    q, k, v = (x.reshape(0, x.shape[1], 1, 1) for x in (q, k, v))
    return attend_maps(q, k, v, make_partition("dense", (1, 1), step), stage.backend).reshape(B, V, h, w)


# -- making and checking -----------------------------------------------------------------------------------------------


def _spread(module: nn.Module, mesh: DeviceMesh, dim: int) -> None:
    """Gives a layer and the parts of it that DTensors pass through their sharded classes."""
    kinds: dict[type[nn.Module], type[nn.Module]] = {
        SelfAttention2d: ShardedSelfAttention2d,
        InterlacedSparseSelfAttention: ShardedInterlacedSparseSelfAttention,
        ConvNormReLU: ShardedConvNormReLU,
        Conv1x1: ShardedConv1x1,
        nn.Dropout2d: ShardedDropout2d,
        ISAHead: ShardedISAHead,
    }
    if type(module) in kinds:
        module.__class__ = kinds[type(module)]
        module.mesh, module.dim, module.agreed = mesh, dim, set()  # type: ignore[assignment]
    if not isinstance(module, _OnShards):  # what DTensors pass through ends there
        for part in module.children():
            _spread(part, mesh, dim)
        return
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            part.__class__ = ShardedBatchNorm2d
            part.mesh = mesh  # type: ignore[assignment]


def _replicate(module: nn.Module, mesh: DeviceMesh, source: int | None) -> None:
    """A module's own parameters and buffers as replicated DTensors."""
    everywhere = [Replicate()] * mesh.ndim
    for name, parameter in module.named_parameters(recurse=False):
        shared = distribute_tensor(parameter.detach(), mesh, everywhere, src_data_rank=source)
        module.register_parameter(name, nn.Parameter(shared, parameter.requires_grad))
    for name, buffer in module.named_buffers(recurse=False):
        setattr(module, name, distribute_tensor(buffer, mesh, everywhere, src_data_rank=source))


def _check(module: nn.Module) -> None:
    """Raises where a layer cannot be sharded."""
    valid = (SelfAttention2d, InterlacedSparseSelfAttention, ISAModule, ISAHead)
    if type(module) not in valid:
        names = ", ".join(kind.__name__ for kind in valid)
        raise TypeError(f"module must be one of {names}, not yet sharded, got {type(module).__name__}")
    for name, part in module.named_modules():
        if isinstance(part, SelfAttention2d) and part.pattern == "dense":
            raise ValueError("pattern 'dense' is one group, which cannot be spread over devices")
        if isinstance(part, ConvNormReLU):
            _reach(part.conv)
            if not isinstance(part.norm, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity)):
                kind = type(part.norm).__name__
                raise TypeError(f"{name}.norm must be BatchNorm2d, SyncBatchNorm or Identity to be sharded, got {kind}")


def _reach(conv: nn.Conv2d) -> int:
    """How many rows beyond its own a convolution reads. Raises TypeError where it does not keep the map's size."""
    reach = [(size - 1) * dilation // 2 for size, dilation in zip(conv.kernel_size, conv.dilation, strict=True)]
    if list(conv.padding) != reach or any(s != 1 for s in conv.stride) or conv.padding_mode != "zeros":
        raise TypeError(f"a sharded convolution must keep the map's size, got {conv}")
    return reach[0]


def _check_map(x: Any, mesh: DeviceMesh, dim: int, channels: int | None) -> None:
    """Raises where x is not what a layer takes, as far as every device knows it by itself."""
    placements = _placements(mesh, dim)
    if not isinstance(x, DTensor):
        raise TypeError(f"x must be a DTensor, placed {placements}, got {type(x).__name__}")
    if x.dim() == 4 and channels is None:
        channels = x.shape[1]
    check_map(x, channels or 0)
    if x.device_mesh != mesh:
        raise ValueError(f"x must be on the layer's mesh, {mesh}, got {x.device_mesh}")
    if list(x.placements) != placements:
        raise ValueError(f"x must be placed {placements}, got {list(x.placements)}")


def _check_shard(x: DTensor, mesh: DeviceMesh, dim: int) -> None:
    """Raises ValueError where this device's shard is not its part of the map."""
    cuts, rank = even_cuts(x.shape[2], mesh.size(dim)), mesh.get_local_rank(dim)
    local, expected = x.to_local(), (x.shape[1], cuts[rank + 1] - cuts[rank], x.shape[3])
    if tuple(local.shape[1:]) != expected:
        raise ValueError(
            f"x of shape {tuple(x.shape)} must have {['B', *expected]} on device {rank} of {mesh.size(dim)}, got"
            f" {list(local.shape)}"
        )


def _agree(x: DTensor | None, mesh: DeviceMesh) -> bool:
    """Whether all devices of the mesh have maps of one shape and dtype; None: this one has no map."""
    said = [0] * 5 if x is None else [*x.shape, crc32(str(x.dtype).encode())]
    most = torch.tensor([*said, *(-n for n in said)], device=mesh.device_type)
    if isinstance(most, FakeTensor):
        return True  # nobody is there to agree with
    for dim in range(mesh.ndim):
        most = collectives.wait_tensor(collectives.all_reduce(most, "max", (mesh, dim)))
    largest, least = most.chunk(2)
    return torch.equal(largest, -least)
