"""A map over several devices is the map on one: outputs, gradients, batch statistics; devices are processes on gloo."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import parallelize_module

from isa_triton import InterlacedSparseSelfAttention, ISAHead, ISAModule, SelfAttention2d
from isa_triton.sharding import MapParallel
from tests.cases import outputs_and_gradients, relative_errors, with_random_statistics
from tests.processes import processes

MAPS = (((24, 16), "zeros"), ((33, 20), "zeros"), ((33, 20), "mask"), ((40, 56), "zeros"))  # else P divides: no padding
Call = Callable[[nn.Module, Tensor], Tensor]


def whole(x: Any) -> Tensor:
    """A tensor of all devices; what is replicated needs nothing moved."""
    if not isinstance(x, DTensor):
        return x.detach().clone()
    x, replicated = x.detach(), set(x.placements) == {Replicate()}
    return x.to_local().clone() if replicated else x.full_tensor()


def on_all_devices(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor).double() for name, tensor in found.items()}


def two_stage_errors() -> dict[Any, dict[str, float]]:
    """Relative errors of every tensor against one process in the same precision.

    What fp32 loses depends on the layer, on one device as on many: gradients of normalised channels are sums that
    nearly cancel, and a ReLU may fall on the other side of zero. This seed's layer is far from both.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options: dict[str, Any] = {"partition_size": (8, 4)}
    errors = {}
    for (size, padding), dtype in product(MAPS, (torch.float64, torch.float32)):
        torch.manual_seed(13)
        alone: nn.Module = with_random_statistics(
            InterlacedSparseSelfAttention(6, 16, 5, 20, padding=padding, **options)
        ).to(dtype)
        for conv in alone.modules():  # as trained ones, they keep the variance: rounding is not amplified
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.weight, std=conv.in_channels**-0.5)
        sharded = copy.deepcopy(alone)
        parallelize_module(sharded, mesh, MapParallel())
        for training in (True, False):
            x = torch.randn(2, 6, *size, dtype=dtype)
            place = partial(distribute_tensor, device_mesh=mesh, placements=[Shard(2)])
            found = on_all_devices(outputs_and_gradients(sharded.train(training), x, place=place))
            expected = on_all_devices(outputs_and_gradients(alone.train(training), x))
            errors[size, padding, training, dtype] = relative_errors(found, expected)
    return errors


def difference(
    module: nn.Module, size: tuple[int, int], mesh: DeviceMesh, channels: int = 6, call: Call = nn.Module.__call__
) -> float:
    """The largest relative error of a sharded pass in fp64 against one device."""
    torch.manual_seed(1)  # the same on every device
    module = with_random_statistics(module)
    alone = copy.deepcopy(module)
    parallelize_module(module, mesh, MapParallel(rows="rows"))
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    placements = [Shard(2) if name == "rows" else Shard(0) for name in mesh.mesh_dim_names or ()]
    place = partial(distribute_tensor, device_mesh=mesh, placements=placements)
    found = on_all_devices(outputs_and_gradients(module, x, call, place))
    return max(relative_errors(found, on_all_devices(outputs_and_gradients(alone, x, call))).values())


@pytest.mark.parametrize("devices", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_two_stages_equal_one_device(devices: int, tmp_path: Path) -> None:
    """Outputs, all gradients and batch statistics: to 1e-12 in fp64 and to 1e-5 in fp32."""
    for errors in processes(devices, two_stage_errors, tmp_path):
        assert isinstance(errors, dict), errors
        assert len(errors) == 4 * len(MAPS)
        for (size, padding, training, dtype), found in errors.items():
            for name, error in found.items():
                assert error <= (1e-12 if dtype == torch.float64 else 1e-5), (size, padding, training, dtype, name)


def other_errors() -> dict[str, float]:
    devices = dist.get_world_size()
    mesh = init_device_mesh("cpu", (devices,), mesh_dim_names=("rows",))
    both = init_device_mesh("cpu", (2, devices // 2), mesh_dim_names=("batch", "rows"))
    P: dict[str, Any] = {"partition_size": (4, 4)}

    def isa(*widths: int, **options: Any) -> nn.Module:
        return InterlacedSparseSelfAttention(*widths, **(P | options))

    def head(**options: Any) -> nn.Module:
        return ISAHead(6, 5, 4, key_channels=4, dropout=0.0, **P, **options)

    def upsampled(*size: int) -> Call:
        return lambda head, x: head(x, size=size)

    errors = {
        "batch and rows": difference(isa(6, 4, 5, 7), (13, 10), both),
        "short-long": difference(isa(6, 4, 5, 7, order="short-long"), (13, 10), mesh),
        "q k v o move": difference(isa(6, 2, 3, 9), (13, 10), mesh),
        "recomputed": difference(isa(6, 4, 5, 7, recompute=True), (13, 10), mesh),
        "devices without rows": difference(isa(6, 4, 5, 7), (5, 9), mesh),
        "devices without groups": difference(isa(6, 4, 5, 6, partition_size=(1, 2), padding="mask"), (7, 9), mesh),
        "branches": difference(ISAModule(6, 4, 5, 7, partition_size=((4, 4), (3, 5)), dropout=0.0), (13, 10), mesh),
        "head": difference(head(), (13, 10), mesh),
        "upsampled": difference(head(), (13, 10), mesh, call=upsampled(40, 33)),
        "upsampled by corners": difference(head(align_corners=True), (13, 10), mesh, call=upsampled(40, 33)),
        "upsampled to few rows": difference(head(), (2, 9), mesh, call=upsampled(3, 20)),
    }
    for pattern in ("interlaced", "local", "rows", "columns"):
        stage = SelfAttention2d(6, 4, 5, 7, pattern=pattern, partition_size=(4, 3))
        errors[pattern] = difference(stage, (13, 10), mesh)
    return errors


@pytest.mark.slow
def test_every_layer_equals_one_device(tmp_path: Path) -> None:
    for errors in processes(4, other_errors, tmp_path):
        assert isinstance(errors, dict), errors
        assert {case: error for case, error in errors.items() if error >= 1e-12} == {}


def dropped() -> Tensor:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(dist.get_rank())  # dice of its own for every process
    module = ISAModule(6, 4, 5, 64, dropout=0.5, partition_size=((4, 4),))
    module.fuse.norm.bias.data.fill_(10.0)  # no output is zero by ReLU
    parallelize_module(module, mesh, MapParallel())
    factors: list[Tensor] = []

    def note(dropout: nn.Module, given: tuple[Any, ...], y: Any) -> None:
        factors.append(y.full_tensor().detach() / given[0].full_tensor().detach())

    module.dropout.register_forward_hook(note)
    module(distribute_tensor(torch.randn(2, 6, 9, 8), mesh, [Shard(2)]))
    return factors[0]


def test_dropout_drops_a_channel_on_all_devices(tmp_path: Path) -> None:
    factors = processes(2, dropped, tmp_path)[0].flatten(2)  # [B, C, H W]
    assert torch.equal(factors.amin(2), factors.amax(2))
    assert factors.unique().tolist() == [0.0, 2.0]  # as one device's dice say, and not as many as there are
