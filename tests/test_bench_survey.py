"""What a disturbed machine does to `bench.survey`: a scripted clock says how long each call takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib import pyplot as plt

from bench import check, devices, figures, measure, scaling, survey
from bench.__main__ import main
from bench.cases import NAMES
from bench.compared import PROVIDERS, Provider
from bench.records import read, write
from bench.terminal import Terminal
from bench.workload import QUANTITIES, Cost, Workload
from tests.scripted_device import READ, ScriptedDevice

Clock = dict[tuple[str, int], list[float | Exception]]


def called(name: str, side: int) -> tuple[torch.Tensor, ...]:
    """What a scripted step does."""
    return ()


@pytest.fixture
def conduct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[tuple[str, int], Cost]]:
    """Runs `scaling` without its figures: rows by provider and side; the clock loses the times it has given."""
    clock: Clock = {}

    def step(provider: Provider, workload: Workload, *_: Any) -> Any:
        return partial(called, provider.name, workload.height)

    def seconds(timer: devices.Timer, call: Any, count: int) -> list[float]:
        assert count == 1
        time = clock[call.args].pop(0)
        if isinstance(time, Exception):
            raise time
        return [time]

    monkeypatch.setattr(measure, "step", step)
    monkeypatch.setattr(devices.Timer, "seconds", seconds)
    monkeypatch.setattr(measure, "count", lambda make: (1000 * make.args[1].pixels, 1))
    monkeypatch.setattr(measure, "matmul_rate", lambda *_: 1e9)

    def run(script: Clock, *words: str) -> dict[tuple[str, int], Cost]:
        clock.clear()
        clock.update(script)
        parser = argparse.ArgumentParser()
        scaling.add_arguments(parser)
        args = parser.parse_args(["--out", str(tmp_path), *words])
        sides = sorted({side for _, side in script})
        providers = [PROVIDERS[name] for name in dict.fromkeys(name for name, _ in script)]
        plan = [(survey.workload(args, "attention", "forward", (side, side), (8, 8)), providers) for side in sides]
        rows = survey.conduct(args, Terminal(args), tmp_path / "scaling.csv", plan)
        return {(row.provider, row.height): row for row in rows}

    return run


Conduct = Callable[..., dict[tuple[str, int], Cost]]
SLOW = ("--budget", "0")  # one sample a visit, as of a call that takes long


def test_spread_is_of_the_median_above_the_fastest() -> None:
    assert measure.spread([1.0, 1.0, 9.0]) == 0  # one disturbed call of three moves nothing
    assert measure.spread([1.0, 9.0, 9.0]) == 8
    assert measure.spread([2.0, 3.0]) == 0.25


def test_on_a_device_the_call_that_compiles_is_not_timed() -> None:
    with ScriptedDevice().installed() as gpu:
        compiled: list[str] = []

        def call(name: str) -> tuple[()]:
            gpu.launch(name, 1e-6 if name in compiled else 1000.0)
            compiled.append(name)
            return ()

        times = measure.samples({name: partial(call, name) for name in "ab"}, rounds=0, device="cuda")
    assert {name: each.seconds for name, each in times.items()} == {name: (pytest.approx(1e-6),) for name in "ab"}


def test_one_disturbed_sample_is_no_figure(conduct: Conduct) -> None:
    script: Clock = {("isa", 8): [9.0, 1.0, 1.0, 7.0]}
    row = conduct(script, *SLOW)["isa", 8]
    assert (row.seconds, row.spread, row.samples, row.note) == (1.0, 0.0, 3, "")
    assert script["isa", 8] == [7.0]  # nothing was measured that was not doubtful


def test_what_stays_disturbed_is_doubtful_and_a_rerun_measures_it_alone(conduct: Conduct, tmp_path: Path) -> None:
    row = conduct({("isa", 8): [9.0, 1.0, 5.0], ("unfused", 8): [1.0, 1.0]}, *SLOW)["isa", 8]
    assert (row.seconds, row.samples) == (5.0, 3)
    assert row.note == "the median of the samples is 400% above the fastest"
    assert read(tmp_path / "scaling.csv", Cost)[0] == row
    assert row.doubtful
    again = conduct({("isa", 8): [1.0, 1.0], ("unfused", 8): []}, *SLOW)["isa", 8]
    assert (again.seconds, again.samples, again.note) == (1.0, 2, "")
    conduct({("isa", 8): [], ("unfused", 8): []}, *SLOW)


def test_more_work_in_less_time_is_measured_again(conduct: Conduct) -> None:
    """Warm-up and two samples a visit, all disturbed at first and alike."""
    script: Clock = {("isa", 8): [0.9, 0.9, 0.9, *[0.1] * 6], ("isa", 16): [0.2] * 3}
    rows = conduct(script, "--rounds", "2", "--budget", "inf")
    assert (rows["isa", 8].seconds, rows["isa", 8].samples, rows["isa", 8].note) == (0.1, 6, "")
    script = {("isa", 8): [0.9] * 9, ("isa", 16): [0.2] * 3}
    rows = conduct(script, "--rounds", "2", "--budget", "inf", "--fresh")
    assert rows["isa", 8].note == "slower than 16x16, which is more work"
    assert not rows["isa", 16].doubtful


def test_what_is_skipped_is_not_predicted_from_a_disturbed_sample(
    conduct: Conduct, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = conduct({("isa", 16): [40.0, 0.4, 0.4], ("isa", 32): [1.6, 1.6]}, *SLOW)
    assert (rows["isa", 32].seconds, rows["isa", 32].samples) == (1.6, 2)  # as soon as the samples of 16x16 differed
    monkeypatch.setattr(survey, "AGAIN", 0)
    rows = conduct({("isa", 8): [0.1], ("isa", 16): [40.0], ("isa", 32): [1.6]}, *SLOW, "--fresh")
    assert rows["isa", 32].seconds == 1.6  # at once, where a smaller map says better


def test_what_is_predicted_to_take_long_is_a_row_with_its_reason(conduct: Conduct) -> None:
    rows = conduct({("isa", 8): [1.0, 1.0], ("isa", 64): []}, *SLOW)
    assert (rows["isa", 64].seconds, rows["isa", 64].note) == (None, "would take about 64 s")


def test_who_fails_is_a_row_with_its_reason_and_stops_nobody(conduct: Conduct) -> None:
    failing: list[float | Exception] = [RuntimeError("out of memory\nand more")]
    rows = conduct({("isa", 8): failing, ("unfused", 8): [1.0, 1.0]}, *SLOW)
    assert (rows["isa", 8].seconds, rows["isa", 8].note) == (None, "RuntimeError: out of memory")
    assert rows["unfused", 8].seconds == 1.0
    conduct({("isa", 8): [], ("unfused", 8): []}, *SLOW)  # nor is it tried again unless told, by --fresh


def test_who_cannot_be_built_is_a_row_with_its_reason(conduct: Conduct, monkeypatch: pytest.MonkeyPatch) -> None:
    make = measure.step

    def step(provider: Provider, *rest: Any) -> Any:
        if provider.name == "dense":
            raise RuntimeError("CUDA out of memory")
        return make(provider, *rest)

    monkeypatch.setattr(measure, "step", step)
    rows = conduct({("isa", 8): [1.0] * 6, ("dense", 8): []}, *SLOW)
    assert rows["dense", 8].note == "RuntimeError: CUDA out of memory"
    assert rows["isa", 8].seconds == 1.0


def test_a_run_of_some_maps_remembers_the_others(conduct: Conduct) -> None:
    options = "--rounds", "2", "--budget", "inf"
    conduct({("isa", 8): [0.9] * 9, ("isa", 16): [0.2] * 3}, *options)
    assert conduct({("isa", 8): [0.9] * 9}, *options)["isa", 8].note == "slower than 16x16, which is more work"


def test_what_was_timed_elsewhere_stays_where_it_is_not_timed_here(
    conduct: Conduct, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    conduct({("isa", 8): [1.0] * 2}, *SLOW)
    here = measure.conditions("cpu")
    monkeypatch.setattr(measure, "conditions", lambda device: here | {"host": "another"})
    assert conduct({("isa", 8): []}, *SLOW, "--memory-limit", "0")["isa", 8].note.startswith("would need")
    (row,) = read(tmp_path / "scaling.csv", Cost)
    assert (row.seconds, row.host) == (1.0, here["host"])


def test_no_ratio_to_a_doubtful_time_is_a_message() -> None:
    def row(name: str, side: int, seconds: float, note: str = "") -> Cost:
        workload = Workload("attention", "forward", side, side)
        return replace(Cost.of(name, workload, "cpu"), seconds=seconds, note=note)

    rows = [row("isa", 8, 1), row("dense-sdpa", 8, 2), row("isa", 16, 1, "one sample"), row("dense-sdpa", 16, 90)]
    assert "takes 2 times ISA's time on 8x8" in figures.message(rows, QUANTITIES[2])


def test_rows_of_another_machine_are_not_mixed_with_these(conduct: Conduct, monkeypatch: pytest.MonkeyPatch) -> None:
    conduct({("isa", 8): [1.0, 1.0]}, *SLOW)
    here = measure.conditions()
    monkeypatch.setattr(measure, "conditions", lambda device: here | {"host": "an abacus"})
    row = conduct({("isa", 8): [3.0, 3.0]}, *SLOW)["isa", 8]
    assert (row.seconds, row.host) == (3.0, "an abacus")


def test_redraw_draws_what_is_there_and_measures_nothing(
    conduct: Conduct, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conduct({("isa", 8): [4.5, 1.0, 2.5], ("dense-sdpa", 8): [2.0, 2.0], ("isa", 64): []}, *SLOW)
    before = (tmp_path / "scaling.csv").read_text()
    main(["scaling", "--redraw", "--out", str(tmp_path), "--sizes", "8", "64"])
    assert (tmp_path / "scaling.csv").read_text() == before
    assert {path.name for path in tmp_path.glob("*.png")} == {"scaling.png", "flops.png", "memory.png", "time.png"}
    said = capsys.readouterr().out
    assert "4 rows, 2 timed, 1 of these doubtful; --verbose says why." in said
    assert "Time of attention over a feature map" in said  # and no ratio to a doubtful time


def test_a_plot_rings_what_is_doubtful_and_crosses_what_was_not_run() -> None:
    def row(side: int, **found: Any) -> Cost:
        return Cost("isa", "attention", "forward", side, side, 1, 1, 1, "8x8", "float32", "cpu", **found)

    rows = [row(8, seconds=1.0), row(16, seconds=5.0, note="one sample"), row(32, note="would take about 7 s")]
    figure, panel = plt.subplots()
    figures._draw_lines(panel, rows, QUANTITIES[2], lambda row: row.height, figures.LOOKS)
    drawn = {line.get_label(): list(line.get_xdata()) for line in panel.lines}
    plt.close(figure)
    labels = figures.LOOKS["isa"].title, figures.DOUBTFUL["label"], figures.NOT_RUN["label"]
    assert drawn == dict(zip(labels, ([8, 16], [16], [32]), strict=True))


# -- on a device -------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Cost]]]:
    """Runs a plan of one map on a GPU by script of 1 MB; what a provider does there is a function of it."""
    does: dict[str, Callable[[], Any]] = {}
    monkeypatch.setattr(Workload, "inputs", lambda workload, device: (torch.ones(1),))
    monkeypatch.setattr(measure, "step", lambda provider, *_: lambda: does[provider.name]() or ())
    monkeypatch.setattr(measure, "count", lambda make: (1000, 2000))
    monkeypatch.setattr(measure, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(devices, "clocks", lambda device: "SM 1755 of 1980 MHz, memory 2619 MHz")
    monkeypatch.setattr("bench.arguments.device", str)
    with ScriptedDevice(total=10**6).installed() as gpu:

        def run(script: dict[str, Callable[[], Any]], *words: str) -> dict[str, Cost]:
            does.clear()
            does.update(script)
            parser = argparse.ArgumentParser()
            scaling.add_arguments(parser)
            args = parser.parse_args(["--out", str(tmp_path), *words])
            args.device = "cuda"
            workload = survey.workload(args, "attention", "forward", (8, 8), (8, 8))
            plan = [(workload, [PROVIDERS[name] for name in script])]
            return {row.provider: row for row in survey.conduct(args, Terminal(args), tmp_path / "scaling.csv", plan)}

        run.gpu = gpu  # type: ignore[attr-defined]
        yield run


def test_rows_of_a_device_say_how_and_at_which_clocks_and_what_was_allocated(on_device: Any, tmp_path: Path) -> None:
    gpu = on_device.gpu

    def waits() -> None:
        gpu.launch("whole", 4e-6)
        gpu.wait()

    def allocates() -> None:
        gpu.allocate(2500)
        gpu.launch("long", 3e-6)
        gpu.launch("short", 2e-6)
        gpu.free(2500)

    rows = on_device({"isa-triton": allocates, "dense": waits})
    row, dense = rows["isa-triton"], rows["dense"]
    assert (row.seconds, row.how, row.allocated_bytes) == (pytest.approx(5e-6), "graph", 2500)
    assert (dense.seconds, dense.how, dense.allocated_bytes) == (pytest.approx(4e-6), "queue", 0)
    assert (row.host, row.clocks) == ("A scripted GPU", "SM 1755 of 1980 MHz, memory 2619 MHz")
    spans = [names for names in gpu.timed if names != [READ]]
    assert [spans.count(names) for names in (["long", "short"], ["whole"])] == [6, 6]  # five rounds and a warm-up
    assert len(spans) == 12
    assert survey.tally(list(rows.values())) == (
        "2 rows, 2 timed, 0 of these doubtful. Timed 1 as replayed graphs and 1 in a queue of work, at SM 1755 of "
        "1980 MHz, memory 2619 MHz. What was allocated is 1.25 times the memory counted."
    )
    (table,) = scaling.summary([replace(row, provider="isa"), dense])
    assert ["MiB allocated", "isa", "0.00238"] in table.rows
    scaling.draw([replace(row, provider="isa"), row], tmp_path)
    assert read(tmp_path / "scaling.csv", Cost) == list(rows.values())


@pytest.mark.parametrize("when", ["at once", "beside the others", "as a graph"])
def test_who_runs_out_of_a_devices_memory_is_a_row_with_its_reason(on_device: Any, when: str) -> None:
    gpu, calls = on_device.gpu, list[bool]()

    def greedy() -> None:
        calls.append(gpu.captured is not None)
        if len(calls) > {"at once": 0, "beside the others": 2, "as a graph": 99}[when] or calls[-1]:
            gpu.allocate(10**7)
        gpu.launch("greedy", 1e-6)

    rows = on_device({"dense": greedy, "isa-triton": lambda: gpu.launch("ours", 1e-6), "unfused": lambda: 1 / 0})
    assert (rows["dense"].seconds, rows["dense"].samples) == (None, 0)
    assert rows["dense"].note == "OutOfMemoryError: CUDA out of memory. Tried to allocate 10000000 bytes"
    assert rows["unfused"].note == "ZeroDivisionError: division by zero"
    assert rows["isa-triton"].seconds == pytest.approx(1e-6)
    assert gpu.released >= 3


def test_inputs_that_do_not_fit_are_everybodys_reason(on_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workload, "inputs", lambda *_: on_device.gpu.allocate(10**7))
    rows = on_device({"dense": lambda: None, "isa": lambda: None})
    assert {row.note.split(".")[0] for row in rows.values()} == {"OutOfMemoryError: CUDA out of memory"}


def test_who_cannot_be_counted_is_a_row_with_its_reason(on_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "count", lambda make: 1 / 0 if make.args[0].name == "dense" else (1000, 2000))
    rows = on_device({"dense": lambda: None, "isa": lambda: on_device.gpu.launch("ours", 1e-6)})
    assert (rows["dense"].note, rows["dense"].samples) == ("not counted: ZeroDivisionError: division by zero", 0)
    assert rows["isa"].seconds == pytest.approx(1e-6)


def test_the_limit_of_a_devices_memory_is_what_it_has_unless_told(
    on_device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "count", lambda make: (1000, 1_100_000))
    assert on_device({"isa": lambda: None})["isa"].note == "would need 0.0 GB"
    does = {"isa": lambda: on_device.gpu.launch("ours", 1e-6)}
    assert on_device(does, "--memory-limit", "1")["isa"].note == ""


def test_flops_are_those_of_the_backend_that_runs_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors of a GPU "auto" takes the kernels, which allocate less than eager does on a CPU."""
    args = argparse.Namespace(device="cuda", memory_limit=None, dtype="float32")
    workload = Workload("attention", "forward", 16, 24, 64, 32, 64)
    on_cpu = {name: measure.count(partial(measure.step, PROVIDERS[name], workload)) for name in ("isa", "isa-triton")}
    monkeypatch.setattr(measure, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))  # no CUDA
    with ScriptedDevice().installed():
        asked = survey.Survey(args)
    row = asked.counted(PROVIDERS["isa"], workload)
    assert (row.flops, row.peak_bytes) == on_cpu["isa-triton"]
    assert row.peak_bytes < on_cpu["isa"][1]


def test_a_plot_shows_what_a_device_allocated_beside_what_was_counted() -> None:
    rows = [replace(Cost("isa", "attention", "forward", 8, 8, 1, 1, 1, "8x8", "float32", "cuda"), peak_bytes=2**20,
                    allocated_bytes=3 * 2**20, seconds=1.0)]  # fmt: skip
    for quantity, labels in ((QUANTITIES[1], {figures.ON_DEVICE["label"]: [3.0]}), (QUANTITIES[2], {})):
        figure, panel = plt.subplots()
        figures._draw_lines(panel, rows, quantity, lambda row: row.height, figures.LOOKS)
        drawn = {line.get_label(): list(line.get_ydata()) for line in panel.lines}
        plt.close(figure)
        assert {label: y for label, y in drawn.items() if label != figures.LOOKS["isa"].title} == labels


def test_eight_groups_of_errors_are_drawn(tmp_path: Path) -> None:
    rows = [
        check.Row(backend, "", dtype, 1.0, 0, *[0.5] * 6, None, None)
        for backend, dtype in product(("triton", "eager", "another"), ("float32", "tf32", "float16", "bfloat16"))
    ]
    figures.error_budget(rows, NAMES, tmp_path / "check.png")
    assert (tmp_path / "check.png").stat().st_size > 1000


@pytest.mark.parametrize("name", ["scaling", "partitions", "heads"])
def test_committed_rows_are_read(name: str, tmp_path: Path) -> None:
    path = Path(__file__).parent.parent / "bench" / "results" / f"{name}.csv"
    write(tmp_path / "again.csv", Cost, read(path, Cost))
    assert (tmp_path / "again.csv").read_text() == path.read_text()
