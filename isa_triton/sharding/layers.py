"""Layers between DTensors whose rows lie on several devices."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.nn.utils.stateless import _reparametrize_module

from .._tracing import is_fake
from ..maps import Conv1x1, ConvNormReLU, check_map
from ..modules import InterlacedSparseSelfAttention, ISAHead, SelfAttention2d
from .exchange import exchange
from .layouts import Lines, Region, even_cuts, halo, slabs
from .resampling import Samples, interpolated, sample_lines
from .stages import Shards, cascade


class ShardedLayer(nn.Module):
    """A layer between DTensors; what it does to local rows, with local parameters, is `forward_local`."""

    mesh: DeviceMesh
    dim: int
    agreed: set[Any]  # the shapes that all devices are known to share

    def forward(self, *maps: Any) -> DTensor:
        for x in maps:
            self.check_input(x, self.expected_channels if len(maps) == 1 else None)
        shards = Shards(self.mesh, self.dim, even_cuts(maps[0].shape[2], self.mesh.size(self.dim)))
        summed = [Partial()] * self.mesh.ndim  # every device has its pixels' part of a parameter's gradient
        tensors: dict[str, Any] = dict(self.named_buffers()) | dict(self.named_parameters())
        tensors = {
            name: x.redistribute(placements=x.placements).to_local(grad_placements=summed)
            for name, x in tensors.items()
        }
        with _reparametrize_module(self, tensors):  # functional_call would call forward, which this is
            y = self.forward_local(shards, *(x.to_local() for x in maps))
        return to_dtensor(y, shards, batch=len(maps[0]))

    def check_input(self, x: Any, channels: int | None) -> None:
        """Raises where x is not what the layer takes; at a new shape or dtype on all devices, if on one of them."""
        key = problem = None
        try:
            _check_dtensor(x, self.mesh, self.dim, channels)
            key = x.shape, x.to_local().shape, x.dtype
            if key in self.agreed:
                return
            _check_shard(x, self.mesh, self.dim)
        except (TypeError, ValueError) as error:
            if key is None and self.agreed:
                raise  # the others may know their shapes already, and do not ask
            problem = error
        agreed = _devices_agree(x if problem is None else None, self.mesh)
        if problem is not None:
            raise problem
        if not agreed:
            raise ValueError(f"x must be one map, got shape {tuple(x.shape)}, {x.dtype} here and another elsewhere")
        self.agreed.add(key)

    @property
    def expected_channels(self) -> int | None:
        """Width of the layer's input, where it has to have one."""
        return None

    def forward_local(self, shards: Shards, *maps: Tensor) -> Tensor:
        """The layer on this device's rows: per pixel, the layer as it was."""
        return super().forward(*maps)


def to_dtensor(y: Tensor, shards: Shards, batch: int) -> DTensor:
    """The map [batch, C, H, W] of which every device has rows y."""
    C, H, W = y.shape[1], shards.height, y.shape[3]
    shape, stride = torch.Size((batch, C, H, W)), (H * W * C, 1, W * C, C)
    placements = placements_of(shards.mesh, shards.dim)
    return DTensor.from_local(y, shards.mesh, placements, run_check=False, shape=shape, stride=stride)


def placements_of(mesh: DeviceMesh, dim: int) -> list[Placement]:
    """Rows along one dimension of the mesh, the batch along all others."""
    return [Shard(2) if i == dim else Shard(0) for i in range(mesh.ndim)]


class ShardedConv1x1(ShardedLayer, Conv1x1):
    """`Conv1x1` between DTensors."""

    @property
    def expected_channels(self) -> int:
        return self.in_channels


class ShardedConvNormReLU(ShardedLayer, ConvNormReLU):
    """`ConvNormReLU` between DTensors. A convolution over several rows first fetches those beyond its cuts."""

    @property
    def expected_channels(self) -> int:
        return self.conv.in_channels

    def forward_local(self, shards: Shards, *maps: Tensor) -> Tensor:
        reach = reach_of(self.conv)
        if reach == 0:
            return super().forward_local(shards, *maps)
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


class ShardedDropout2d(ShardedLayer, nn.Dropout2d):
    """`Dropout2d` between DTensors: a channel is dropped on the whole map, as the first device's dice say."""

    def forward_local(self, shards: Shards, *maps: Tensor) -> Tensor:
        (x,) = maps
        if not self.training or self.p == 0:
            return x
        kept = F.dropout2d(x.new_ones(*x.shape[:2], 1, 1), self.p) * (shards.rank == 0)
        return x * collectives.all_reduce(kept, "sum", (shards.mesh, shards.dim))


class ShardedSelfAttention2d(ShardedLayer, SelfAttention2d):
    """`SelfAttention2d` between DTensors."""

    @property
    def expected_channels(self) -> int:
        return self.value.in_channels

    def forward_local(self, shards: Shards, *maps: Tensor) -> Tensor:
        return cascade((self,), shards, *maps)


class ShardedInterlacedSparseSelfAttention(ShardedLayer, InterlacedSparseSelfAttention):
    """`InterlacedSparseSelfAttention` between DTensors."""

    @property
    def expected_channels(self) -> int:
        return self.stages[0].value.in_channels

    def forward_local(self, shards: Shards, *maps: Tensor) -> Tensor:
        return cascade(self.stages, shards, *maps)


class ShardedISAHead(ISAHead):
    """`ISAHead` between DTensors: its parts are sharded themselves, upsampling joins rows across the cuts."""

    mesh: DeviceMesh
    dim: int

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        logits: Any = super().forward(x)
        if size is None:
            return logits
        (B, _, H, W), devices = logits.shape, self.mesh.size(self.dim)
        shards = Shards(self.mesh, self.dim, even_cuts(size[0], devices))
        rows, columns = (sample_lines(n, wanted, self.align_corners) for n, wanted in ((H, size[0]), (W, size[1])))
        needed = tuple(
            Region(Lines(rows.low[begin], rows.high[end - 1] + 1) if begin < end else Lines(0, 0), Lines(0, W))
            for begin, end in pairwise(shards.cuts)
        )
        y = exchange(logits.to_local(), slabs(even_cuts(H, devices), W), needed, self.mesh, self.dim)
        mine = Samples(*(values[shards.begin : shards.end] for values in rows))
        first = needed[shards.rank].rows.begin
        y = interpolated(y, 2, mine._replace(low=mine.low - first, high=mine.high - first))
        return to_dtensor(interpolated(y, 3, columns), shards, batch=B)


def reach_of(conv: nn.Conv2d) -> int:
    """How many rows beyond its own a convolution reads. Raises TypeError where it does not keep the map's size."""
    reach = [(size - 1) * dilation // 2 for size, dilation in zip(conv.kernel_size, conv.dilation, strict=True)]
    if list(conv.padding) != reach or any(s != 1 for s in conv.stride) or conv.padding_mode != "zeros":
        raise TypeError(f"a sharded convolution must keep the map's size, got {conv}")
    return reach[0]


def _check_dtensor(x: Any, mesh: DeviceMesh, dim: int, channels: int | None) -> None:
    """Raises where x is not what a layer takes, as far as every device knows it by itself."""
    placements = placements_of(mesh, dim)
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


def _devices_agree(x: DTensor | None, mesh: DeviceMesh) -> bool:
    """Whether all devices of the mesh have maps of one shape and dtype; None: this one has no map."""
    said = [0] * 5 if x is None else [*x.shape, crc32(str(x.dtype).encode())]
    most = torch.tensor([*said, *(-n for n in said)], device=mesh.device_type)
    if is_fake(most):
        return True  # nobody is there to agree with
    for dim in range(mesh.ndim):
        most = collectives.wait_tensor(collectives.all_reduce(most, "max", (mesh, dim)))
    largest, least = most.chunk(2)
    return torch.equal(largest, -least)
