"""A map over several devices is the map on one: outputs, gradients, statistics, and what moves between devices.

Devices are processes on gloo where numbers matter, and fake ones where only counts do.
"""

from __future__ import annotations

import copy
import faulthandler
import math
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench import sharding as bench
from bench.__main__ import main
from bench.records import read, write
from bench.workload import Workload
from isa_triton import InterlacedSparseSelfAttention, ISAHead, ISAModule, Partition, SelfAttention2d
from isa_triton.sharding import MapParallel
from isa_triton.sharding.exchange import exchanged
from isa_triton.sharding.layouts import columns, even_cuts, groups, halo, slabs, split_residues, windows
from tests.cases import NCHWBatchNorm, lively, relative_error

MAPS = (((24, 16), "zeros"), ((33, 20), "zeros"), ((33, 20), "mask"), ((40, 56), "zeros"))  # else P divides: no padding

# -- processes ---------------------------------------------------------------------------------------------------------


def processes(devices: int, body: Callable[[], Any], folder: Path, timeout: float = 30.0) -> list[Any]:
    """What `body` returned in each of `devices` processes on gloo, or the text of what it raised; None of the dead.

    `timeout` is the group's, in seconds: how long one process waits for another.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor.parallel", "matplotlib.pyplot", "triton"])  # import once
    workers = [
        context.Process(target=_worker, args=(body, rank, devices, folder, timeout), daemon=True)
        for rank in range(devices)
    ]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 3 * timeout
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            pytest.fail(f"a process hangs after {3 * timeout} s")
    paths = [folder / f"result{rank}" for rank in range(devices)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def _worker(body: Callable[[], Any], rank: int, devices: int, folder: Path, timeout: float) -> None:
    faulthandler.dump_traceback_later(2 * timeout, exit=True)  # a process that hangs says where, and ends
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.FileStore(str(folder / "store"), devices)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=devices, timeout=timedelta(seconds=timeout))
    try:
        result = body()
    except Exception:
        result = traceback.format_exc()
    torch.save(result, folder / f"result{rank}")
    os._exit(0)  # threads of a broken group do not keep a process


@contextmanager
def fake_devices(shape: tuple[int, ...], rank: int = 0) -> Iterator[DeviceMesh]:
    """A mesh of devices of which one is here: what it receives means nothing."""
    dist.init_process_group("fake", rank=rank, world_size=math.prod(shape), store=FakeStore())
    try:
        yield init_device_mesh("cpu", shape, mesh_dim_names=("rows", "batch")[: len(shape)])
    finally:
        dist.destroy_process_group()


# -- the same numbers --------------------------------------------------------------------------------------------------


def seeded(module: nn.Module) -> nn.Module:
    """The same lively norms on every device."""
    torch.manual_seed(1)
    return lively(module)


Call = Callable[[nn.Module, Tensor], Tensor]


def everything(
    module: nn.Module, x: Tensor, place: Callable[[Tensor], Tensor] = torch.clone, call: Call = nn.Module.__call__
) -> dict[str, Tensor]:
    """Output, gradients of the input and of all parameters, and the buffers after one pass."""
    module.zero_grad()
    x = place(x).requires_grad_()
    y = call(module, x)
    upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    y.backward(place(upstream))
    gradients: dict[str, Any] = {name: parameter.grad for name, parameter in module.named_parameters()}
    found = {"output": y, "x.grad": x.grad} | gradients | dict(module.named_buffers())
    return {name: whole(tensor).double() for name, tensor in found.items()}


def whole(x: Any) -> Tensor:
    """A tensor of all devices; what is replicated needs nothing moved."""
    if not isinstance(x, DTensor):
        return x.detach().clone()
    x, replicated = x.detach(), set(x.placements) == {Replicate()}
    return x.to_local().clone() if replicated else x.full_tensor()


def errors_of(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert actual.keys() == expected.keys()
    return {name: relative_error(actual[name], expected[name]) for name in expected}


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(errors_of(actual, expected).values())


def two_stage_errors() -> dict[Any, dict[str, float]]:
    """Relative errors of every tensor against one process in the same precision.

    What fp32 loses depends on the layer, on one device as on many: gradients of normalised channels are sums that
    nearly cancel, and a ReLU may fall on the other side of zero. This seed's layer is far from both.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    options: dict[str, Any] = {"partition_size": (8, 4), "norm_layer": NCHWBatchNorm}
    errors = {}
    for (size, padding), dtype in product(MAPS, (torch.float64, torch.float32)):
        torch.manual_seed(13)
        alone: nn.Module = lively(InterlacedSparseSelfAttention(6, 16, 5, 20, padding=padding, **options)).to(dtype)
        for conv in alone.modules():  # as trained ones, they keep the variance: rounding is not amplified
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.weight, std=conv.in_channels**-0.5)
        sharded = copy.deepcopy(alone)
        parallelize_module(sharded, mesh, MapParallel())
        for training in (True, False):
            x = torch.randn(2, 6, *size, dtype=dtype)
            found = everything(sharded.train(training), x, lambda x: distribute_tensor(x, mesh, [Shard(2)]))
            errors[size, padding, training, dtype] = errors_of(found, everything(alone.train(training), x))
    return errors


def difference(
    module: nn.Module, size: tuple[int, int], mesh: DeviceMesh, channels: int = 6, call: Call = nn.Module.__call__
) -> float:
    """The largest relative error of a sharded pass in fp64 against one device."""
    module = seeded(module)
    alone = copy.deepcopy(module)
    parallelize_module(module, mesh, MapParallel(rows="rows"))
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    placements = [Shard(2) if name == "rows" else Shard(0) for name in mesh.mesh_dim_names or ()]
    found = everything(module, x, lambda x: distribute_tensor(x, mesh, placements), call)
    return worst(found, everything(alone, x, call=call))


@pytest.mark.parametrize("devices", [2, 3, 4])
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
    y = module(distribute_tensor(torch.randn(2, 6, 9, 8), mesh, [Shard(2)]))
    return (y.full_tensor() == 0).detach()


def test_dropout_drops_a_channel_on_all_devices(tmp_path: Path) -> None:
    zero = processes(2, dropped, tmp_path)[0].flatten(2)
    assert torch.equal(zero.any(2), zero.all(2))
    assert 0 < zero.all(2).sum() < 128


# -- what moves --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["zeros", "mask"])
@pytest.mark.parametrize(
    ("order", "size", "exchanges"),
    [
        ("long-short", (24, 16), 2),
        ("long-short", (33, 20), 2),
        ("short-long", (24, 16), 2),
        ("short-long", (33, 20), 3),
    ],
)
def test_two_exchanges_in_either_direction(order: str, size: tuple[int, int], exchanges: int, padding: str) -> None:
    """Exactly two for the published order, on every map; the other order first completes windows that a cut divides."""
    with fake_devices((3,)) as mesh:
        layer = InterlacedSparseSelfAttention(
            6, 4, 5, 7, partition_size=(4, 4), padding=padding, order=order, activation=nn.ReLU
        )
        parallelize_module(layer, mesh, MapParallel())
        x = distribute_tensor(torch.randn(1, 6, *size), mesh, [Shard(2)]).requires_grad_()
        with CommDebugMode() as forward:
            y = layer(x)
        upstream = distribute_tensor(torch.randn(y.shape), mesh, [Shard(2)])
        with CommDebugMode() as backward:
            y.backward(upstream)
    for counted in (forward, backward):
        counts = counted.get_comm_counts()
        assert counts[torch.ops.c10d_functional.all_to_all_single] == exchanges
        assert counts.keys() <= {
            torch.ops.c10d_functional.all_to_all_single,
            torch.ops.c10d_functional.all_reduce,  # batch statistics, gradients of parameters
        }


@pytest.mark.parametrize("pass_", ["forward", "training"])
def test_memory_and_traffic_of_a_device_fall_as_one_over_n(pass_: Any) -> None:
    """On a map of 2048 x 512; parameters, which every device has, are small beside it."""
    workload = Workload("module", pass_, 2048, 512, 64, 32, 64, (32, 32))
    alone = bench.simulate(workload, 1, 0, backend="triton")
    for devices in (2, 3, 4, 8, 16, 32, 64):
        flops, peak_bytes, sent_bytes = bench.simulate(workload, devices, devices // 2, backend="triton")
        assert abs(peak_bytes * devices / alone[1] - 1) < 0.15, devices
        assert abs(sent_bytes / bench.bound(workload, devices) - 1) < 0.05, devices
        assert abs(flops * devices / alone[0] - 1) < 0.15, devices


def test_pixels_counted_by_hand_are_those_on_the_wire() -> None:
    size, P, devices = (48, 20), (8, 4), 4
    cuts = even_cuts(size[0], devices)
    there, back = (
        (slabs(cuts, size[1]), groups(size, P, devices)),
        (groups(size, P, devices), windows(cuts, P[0], size[1])),
    )
    workload = Workload("module", "forward", *size, 16, 16, 16, P)
    for rank in range(devices):
        pixels = sum(exchanged(*way, rank) for way in (there, back))
        assert bench.simulate(workload, devices, rank)[2] == pixels * 16 * 4


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
def test_groups_are_dealt_evenly(devices: int) -> None:
    shares = [(h[1] - h[0]) * (w[1] - w[0]) for h, w in split_residues((0, 8), (0, 8), devices)]
    assert len(shares) == devices
    assert sum(shares) == 64
    assert max(shares) <= 2 * math.ceil(64 / devices)
    if 64 % devices == 0:
        assert set(shares) == {64 // devices}


# -- what is refused, and what breaks ----------------------------------------------------------------------------------


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
    with fake_devices((2, 2)) as mesh, bench.Wire(0) as wire:
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
        with bench.Wire(dist.get_rank()) as wire, pytest.raises(ValueError, match="x ") as error:
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


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_runs_counts_and_keeps_other_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sharding", "--out", str(tmp_path), "--size", "16x12", "--channels", "8", "--rounds", "1"]
    simulation = ["--simulated-sizes", "64x48", "--simulated-channels", "8", "--simulated-partition-size", "8"]
    main([*words, *simulation, "--devices", "1", "4"])
    rows = read(tmp_path / "sharding.csv", bench.Row)
    assert {(row.source, row.devices) for row in rows} == {("run", 1), ("simulated", 1), ("simulated", 4)}
    assert all((row.seconds is not None) == (row.source == "run") for row in rows)
    printed = capsys.readouterr().out
    assert "1 processes of one thread on" in printed
    assert "PREDICTED seconds" in printed
    write(tmp_path / "sharding.csv", bench.Row, [replace(row, devices=2) for row in rows[:1]])
    main([*words, "--devices"])
    assert {(row.source, row.devices) for row in read(tmp_path / "sharding.csv", bench.Row)} == {
        ("run", 1),
        ("run", 2),
    }
    assert (tmp_path / "sharding.png").stat().st_size > 0
