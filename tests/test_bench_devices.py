"""`bench.devices` on a GPU by script: what is timed is what was named, from a cold cache, without the host."""

from __future__ import annotations

import doctest
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import devices, inference, measure
from bench.devices import Timer
from tests.scripted_device import READ, ScriptedDevice, kernels

MICRO = 1e-6


@pytest.fixture
def gpu() -> Iterator[ScriptedDevice]:
    with ScriptedDevice().installed() as device:
        yield device


# -- seconds -----------------------------------------------------------------------------------------------------------


def test_a_graph_is_timed_from_a_cold_cache_without_the_host(gpu: ScriptedDevice) -> None:
    """Of two kernels the first takes 2 us, the second finds its inputs in the cache and takes 1; launching takes 10."""
    timer = Timer("cuda")
    assert timer.seconds(kernels(gpu, "scores", "values"), 3) == pytest.approx([3 * MICRO] * 3)
    assert timer.how == "graph"
    assert gpu.timed[-3:] == [["scores", "values"]] * 3
    assert set(gpu.streams) == {7}


def test_a_call_that_was_timed_before_is_neither_made_nor_captured_again(gpu: ScriptedDevice) -> None:
    timer, call = Timer("cuda"), kernels(gpu, "kernel")
    timer.seconds(call, 1)
    before = len(gpu.launched)
    timer.seconds(call, 2)
    assert [name for name in gpu.launched[before:] if name != READ] == ["kernel"] * 2
    assert len(gpu.pools) == 1


def test_graphs_share_their_memory(gpu: ScriptedDevice) -> None:
    timer = Timer("cuda")
    for name in "abc":
        timer.seconds(kernels(gpu, name), 1)
    assert len(gpu.pools) == 3
    assert len({id(pool) for pool in gpu.pools}) == 1


@pytest.mark.parametrize("launches", [1, 40])
def test_what_cannot_be_captured_is_queued_behind_as_many_reads_as_hide_the_host(launches: int) -> None:
    """The host takes 10 us a launch, ten times as long as the device, and 40 launches are four reads long."""
    with ScriptedDevice().installed() as gpu:
        call = kernels(gpu, *["kernel"] * launches)

        def never_captured() -> None:
            if gpu.captured is not None:
                raise RuntimeError("this operator has no form for graphs")
            call()

        timer = Timer("cuda")
        assert timer.seconds(never_captured, 2) == pytest.approx([(1 + launches) * MICRO] * 2)
        assert timer.how == "queue"
        assert gpu.timed[-2:] == [["kernel"] * launches] * 2


def test_a_call_that_waits_for_the_device_is_queued_and_its_wait_is_in_its_time(gpu: ScriptedDevice) -> None:
    call = kernels(gpu, "kernel")
    timer = Timer("cuda")

    def waits() -> None:
        call()
        gpu.wait()
        call()

    (seconds,) = timer.seconds(waits, 1)
    assert timer.how == "queue"
    assert gpu.timed[-1] == ["kernel", "kernel"]
    assert seconds == pytest.approx(13 * MICRO)  # 2 cold, 10 until the host has launched the second, 1 of that


def test_a_device_without_graphs_queues(gpu: ScriptedDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ScriptedDevice, "CUDAGraph")
    timer = Timer("xpu")
    assert timer.seconds(kernels(gpu, "kernel"), 1) == pytest.approx([2 * MICRO])
    assert timer.how == "queue"


@pytest.mark.parametrize("captured", [False, True])
def test_no_memory_is_no_reason_to_queue(gpu: ScriptedDevice, captured: bool) -> None:
    """A graph needs memory of its own: where a call fits once and not twice, it does not fit."""

    def call() -> None:
        gpu.launch("kernel", MICRO)
        if captured == (gpu.captured is not None):
            gpu.allocate(2 << 30)

    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        Timer("cuda").seconds(call, 1)


def test_a_cpu_is_timed_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    timer = Timer("cpu")
    times = timer.seconds(lambda: calls.append(1), 3)
    assert (len(times), len(calls), timer.how) == (3, 3, "clock")
    assert all(0 <= seconds < 1 for seconds in times)


def test_samples_of_a_device_are_interleaved_and_say_how(gpu: ScriptedDevice) -> None:
    def bad() -> tuple[()]:
        gpu.allocate(2 << 30)
        return ()

    steps = {name: kernels(gpu, name) for name in "ab"} | {"bad": bad}
    failures: dict[str, str] = {}
    times = measure.samples(steps, rounds=2, device="cuda", failures=failures)
    assert times == {name: (pytest.approx((2 * MICRO,) * 2), "graph") for name in "ab"}
    assert [names for names in gpu.timed if names != [READ]] == [["a"], ["b"], ["b"], ["a"], ["a"], ["b"]]
    assert failures == {"bad": f"OutOfMemoryError: CUDA out of memory. Tried to allocate {2 << 30} bytes"}
    assert gpu.released == 1
    with pytest.raises(torch.OutOfMemoryError):
        measure.samples(steps, device="cuda")


def test_folded_inference_on_a_device_says_how_it_was_timed(
    gpu: ScriptedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "matmul_share", lambda step, device: 0.5)
    monkeypatch.setattr(devices, "clocks", lambda device: "SM 1755 of 1980 MHz, memory 2619 MHz")
    makes = {"unfused": lambda: kernels(gpu, "many", "more"), "isa": lambda: kernels(gpu, "one")}
    args = Namespace(device="cuda", rounds=2)
    rows = inference._rows("block", (8, 8), makes, dict.fromkeys(makes, (1, 1)), args)
    assert [(row.provider, row.how, row.clocks) for row in rows] == [
        (name, "graph", "SM 1755 of 1980 MHz, memory 2619 MHz") for name in makes
    ]
    assert [row.seconds for row in rows] == pytest.approx([3 * MICRO, 2 * MICRO])
    assert all("graph" in row.cells() for row in rows)


# -- memory and clocks -------------------------------------------------------------------------------------------------


def test_peak_bytes_are_those_above_what_was_there_and_stays(gpu: ScriptedDevice) -> None:
    workspace = [500]  # that a library allocates once, and keeps
    gpu.allocate(3000)

    def call() -> None:
        gpu.allocate(workspace.pop() if workspace else 0)
        gpu.allocate(1000)
        gpu.allocate(200)
        gpu.free(1200)

    assert devices.peak_bytes("cuda", call) == 1200
    gpu.peak = 10**6  # of an earlier call
    assert devices.peak_bytes("cuda", call) == 1200
    with pytest.raises(ValueError, match="device must have an allocator with statistics, got 'cpu'"):
        devices.peak_bytes("cpu", call)


def test_memory_is_the_devices_and_is_given_back(gpu: ScriptedDevice) -> None:
    assert devices.memory("cuda") == 1 << 30
    assert devices.memory("cpu") > 1 << 28
    devices.release("cpu")
    assert gpu.released == 0
    devices.release("cuda")
    assert gpu.released == 1


SMI = '#!/bin/sh\n[ "$1 $2 $3" = "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem --format=csv,noheader,nounits {}" ]'


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (SMI.format("--id=GPU-0123-abc") + ' && echo "1755, 1980, 2619"', "SM 1755 of 1980 MHz, memory 2619 MHz"),
        (SMI.format("--id=0") + ' && echo "1755, 1980, 2619"', ""),
        ("#!/bin/sh\necho No devices were found", ""),
        (None, ""),
    ],
)
def test_clocks_are_those_that_the_driver_reports(
    script: str | None, said: str, gpu: ScriptedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script:
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert devices.clocks("cuda") == said
    assert devices.clocks("cpu") == ""


def test_examples_in_docstrings() -> None:
    results = doctest.testmod(devices)
    assert (results.failed, results.attempted) == (0, 1)
