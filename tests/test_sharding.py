"""What moves between the devices that share a map, how much memory each needs, and the command that counts both."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module

from bench import figures
from bench import sharding as bench
from bench.__main__ import main
from bench.records import read, write
from bench.workload import Workload
from isa_triton import InterlacedSparseSelfAttention
from isa_triton.sharding import MapParallel
from isa_triton.sharding.exchange import exchanged
from isa_triton.sharding.layouts import even_cuts, groups, slabs, windows
from tests.processes import fake_devices


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
def test_there_are_two_exchanges_in_either_direction(
    order: str, size: tuple[int, int], exchanges: int, padding: str
) -> None:
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


@pytest.mark.parametrize("pass_", ["forward", pytest.param("training", marks=pytest.mark.slow)])
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


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_runs_counts_and_keeps_other_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sharding", "--out", str(tmp_path), "--size", "16x12", "--channels", "8", "--rounds", "1"]
    simulation = ["--simulated-sizes", "64x48", "--simulated-channels", "8", "--simulated-partition-size", "8"]
    main([*words, *simulation, "--devices", "1", "4"])
    rows = read(tmp_path / "sharding.csv", bench.Row)
    assert {(row.source, row.devices) for row in rows} == {("run", 1), ("simulated", 1), ("simulated", 4)}
    assert all((row.seconds is not None) == (row.source == "run") for row in rows)
    assert all(row.cores and row.host and (row.samples == 1) == (row.source == "run") for row in rows)
    printed = capsys.readouterr().out
    assert "1 processes of one thread on" in printed
    assert "PREDICTED seconds" in printed
    write(tmp_path / "sharding.csv", bench.Row, [replace(row, devices=2) for row in rows[:1]])
    main([*words, "--devices"])
    assert {(row.source, row.devices) for row in read(tmp_path / "sharding.csv", bench.Row)} == {
        ("run", 1),
        ("run", 2),
    }
    picture = tmp_path / "sharding.png"
    assert picture.stat().st_size > 0
    picture.unlink()
    rows_before = (tmp_path / "sharding.csv").read_text()
    main([*words, "--redraw"])
    assert picture.stat().st_size > 0
    assert (tmp_path / "sharding.csv").read_text() == rows_before


def test_times_of_more_processes_than_cores_are_hollow_and_grey() -> None:
    path = Path(__file__).parent.parent / "bench" / "results" / "sharding.csv"
    rows = [
        row for row in read(path, bench.Row) if (row.source, row.scaling, row.pass_) == ("run", "strong", "forward")
    ]
    assert [(row.devices, row.cores, row.oversubscribed) for row in rows] == [
        (1, 2, False),
        (2, 2, False),
        (4, 2, True),
    ]
    figure, panel = plt.subplots()
    for column in ("seconds", "peak_bytes"):
        figures._draw_devices(panel, rows, column, 1.0, "forward", figures.DEVICE_LOOKS[0])
    fair, hollow, of_bytes, _ = panel.lines
    assert (list(fair.get_xdata()), list(hollow.get_xdata()), list(of_bytes.get_xdata())) == ([1, 2], [2, 4], [1, 2, 4])
    assert (hollow.get_color(), hollow.get_markerfacecolor()) == ("0.6", "none")
    plt.close(figure)
