"""How a layer is spread over the devices of a mesh, and which layers can be."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..maps import Conv1x1, ConvNormReLU
from ..modules import InterlacedSparseSelfAttention, ISAHead, ISAModule, SelfAttention2d
from .layers import (
    ShardedConv1x1,
    ShardedConvNormReLU,
    ShardedDropout2d,
    ShardedInterlacedSparseSelfAttention,
    ShardedISAHead,
    ShardedLayer,
    ShardedSelfAttention2d,
    reach_of,
)
from .norm import ShardedBatchNorm2d


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
            they hold when a layer gets a shape or dtype for the first time, so all of them raise, before any map
            moves.
        RuntimeError: (of `torch.distributed`, in forward or backward) another device died, raised, or took longer than
            the timeout of the process group.

    Examples:
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
        _shard_layers(module, device_mesh, dim)
        for part in module.modules():
            _replicate(part, device_mesh, self.src_data_rank)
        return module


def _shard_layers(module: nn.Module, mesh: DeviceMesh, dim: int) -> None:
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
    if not isinstance(module, ShardedLayer):  # what DTensors pass through ends there
        for part in module.children():
            _shard_layers(part, mesh, dim)
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
        if getattr(part, "axes", 2) != 2:
            raise ValueError(f"maps of two axes alone are spread over devices, and {name or 'module'} has {part.axes}")
        if isinstance(part, SelfAttention2d) and part.pattern == "dense":
            raise ValueError("pattern 'dense' is one group, which cannot be spread over devices")
        if isinstance(part, SelfAttention2d) and part.attention_dropout:
            raise ValueError(
                f"{name or 'module'}.attention_dropout must be 0 to be sharded, got {part.attention_dropout}: what is"
                " dropped depends on where pixels stand in the whole map"
            )
        if isinstance(part, ConvNormReLU):
            reach_of(part.conv)
            if not isinstance(part.norm, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Identity)):
                kind = type(part.norm).__name__
                raise TypeError(f"{name}.norm must be BatchNorm2d, SyncBatchNorm or Identity to be sharded, got {kind}")
