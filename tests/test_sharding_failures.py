"""What cannot be sharded is named before anything moves, and a device that ends or is stuck ends the job."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import parallelize_module

from bench.sharding import Wire
from isa_triton import InterlacedSparseSelfAttention, SelfAttention2d
from isa_triton.sharding import MapParallel
from tests.processes import fake_devices, processes


def test_what_cannot_be_sharded_is_named() -> None:
    isa = InterlacedSparseSelfAttention
    with fake_devices((2, 2)) as mesh:
        for module, error, message in (
            (nn.Conv2d(3, 3, 3), TypeError, "must be one of SelfAttention2d, Inter"),
            (SelfAttention2d(6, 4, 5, pattern="dense"), ValueError, "'dense' is one group"),
            (isa(6, 4, 4, norm_layer=lambda channels: nn.GroupNorm(2, channels)), TypeError, "got GroupNorm"),
        ):
            with pytest.raises(error, match=message):
                parallelize_module(module, mesh, MapParallel())
        for rows in ("height", 2):
            with pytest.raises(ValueError, match=r"must be a dimension of the mesh, 0, 1, 'rows', 'batch', got"):
                parallelize_module(isa(6, 4, 5), mesh, MapParallel(rows=rows))
        layer = parallelize_module(isa(6, 4, 5), mesh, MapParallel())
        with pytest.raises(TypeError, match="not yet sharded"):
            parallelize_module(layer, mesh, MapParallel())


def test_wrong_maps_are_refused_before_anything_moves() -> None:
    with fake_devices((2, 2)) as mesh, Wire(0) as wire:
        layer = parallelize_module(InterlacedSparseSelfAttention(6, 4, 5), mesh, MapParallel(), src_data_rank=None)

        def shard(local: tuple[int, ...], whole: tuple[int, ...], placements: Any, mesh: DeviceMesh = mesh) -> DTensor:
            strides = torch.empty(whole, device="meta").stride()
            return DTensor.from_local(torch.ones(local), mesh, placements, shape=torch.Size(whole), stride=strides)

        right = [Shard(2), Shard(0)]
        for x, error, message in (
            (torch.ones(2, 6, 9, 8), TypeError, "must be a DTensor.*got Tensor"),
            (shard((2, 6, 9, 8), (2, 6, 9, 8), [Replicate()] * 2), ValueError, "must be placed"),
            (shard((6, 9, 8), (6, 18, 8), [Shard(1), Shard(0)]), ValueError, "must be"),
            (shard((1, 6, 9, 8), (2, 6, 16, 8), right), ValueError, r"must have \['B', 6, 8, 8\] on device 0 of 2"),
            (shard((1, 5, 8, 8), (2, 5, 16, 8), right), ValueError, r"x must be \[B, 6, H, W\]"),
            (shard((2, 6, 8, 8), (2, 6, 8, 8), [Shard(0)], mesh["rows"]), ValueError, "on the layer's mesh"),
        ):
            with pytest.raises(error, match=message):
                layer(x)
    assert wire.exchanges == 0


def layer_and_map(
    local: int, height: int, channels: int = 6, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, DTensor]:
    """A layer, and this process's rows of a map as it sees it."""
    mesh = init_device_mesh("cpu", (2,))
    layer = parallelize_module(InterlacedSparseSelfAttention(6, 4, 5).eval(), mesh, MapParallel())
    shape, stride = torch.Size((1, channels, height, 16)), (channels * height * 16, height * 16, 16, 1)
    rows = torch.randn(1, channels, local, 16, dtype=dtype)
    return layer, DTensor.from_local(rows, mesh, [Shard(2)], run_check=False, shape=shape, stride=stride)


MISMATCHES: dict[str, tuple[tuple[Any, ...], tuple[Any, ...], str, str]] = {
    "height": ((8, 16), (24, 48), "got shape (1, 6, 16, 16), torch.float32 here", "got shape (1, 6, 48, 16)"),
    "rows": ((8, 16), (7, 16), "and another elsewhere", "must have ['B', 6, 8, 16] on device 1 of 2"),
    "channels": ((8, 16), (8, 16, 5), "and another elsewhere", "x must be [B, 6, H, W]"),
    "dtype": ((8, 16), (8, 16, 6, torch.float64), "torch.float32 here", "torch.float64 here"),
}


def mismatched() -> dict[str, str]:
    """What this process is told of every mismatch, in one group: after an error, the next map meets in order."""
    told = {}
    for name, case in MISMATCHES.items():
        layer, x = layer_and_map(*case[dist.get_rank()])
        with Wire(dist.get_rank()) as wire, pytest.raises(ValueError, match="x ") as error:
            layer(x)
        assert wire.exchanges == 0
        told[name] = str(error.value)
    return told


def test_shards_of_different_maps_are_refused_everywhere(tmp_path: Path) -> None:
    for rank, told in enumerate(processes(2, mismatched, tmp_path)):
        assert isinstance(told, dict), told
        for name, case in MISMATCHES.items():
            assert case[2 + rank] in told[name]


def broken(end: Callable[[], None]) -> None:
    """In the second pass, device 1 ends between the exchanges, while device 0 waits for it in the second."""
    layer, x = layer_and_map(8, 16)
    layer(x)

    def late(*_: Any) -> None:
        time.sleep(0.5)
        end()

    if dist.get_rank() == 1:
        layer.get_submodule("long_range.output").register_forward_pre_hook(late)
    layer(x)


def killed() -> None:
    broken(lambda: os.kill(os.getpid(), signal.SIGKILL))


def gives_up() -> None:
    def end() -> None:
        raise ArithmeticError("device 1 gives up")

    broken(end)


def stuck() -> None:
    broken(lambda: time.sleep(8))


@pytest.mark.slow
def test_a_process_that_is_stuck_ends_the_job_within_the_timeout(tmp_path: Path) -> None:
    left, _ = processes(2, stuck, tmp_path, timeout=5.0)
    assert "RuntimeError" in left
    assert "Timed out" in left


@pytest.mark.parametrize("body", [killed, gives_up])
def test_a_process_that_ends_ends_the_job(body: Callable[[], None], tmp_path: Path) -> None:
    """At once, with an error on whoever is left and long before the timeout of the group."""
    started = time.monotonic()
    left, ended = processes(2, body, tmp_path, timeout=60.0)
    assert "RuntimeError" in left
    assert ended is None if body is killed else "device 1 gives up" in ended
    assert time.monotonic() - started < 60
