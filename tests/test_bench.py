"""The bench: its instruments against closed forms and real allocations, its providers against each other, its files."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench import measure
from bench.__main__ import COMMANDS, OF_KERNELS, main
from bench.arguments import size
from bench.compared import PROVIDERS
from bench.measure import Counter, Samples, count, seconds, step
from bench.records import read, write
from bench.workload import LEVELS, PASSES, Cost, Level, Pass, Workload, closed_form_flops

ROOT = Path(__file__).parent.parent
PAPER: dict[str, Any] = {"key_channels": 256, "value_channels": 512, "partition_size": (8, 8)}
SMALL: dict[str, Any] = {"channels": 24, "key_channels": 8, "value_channels": 20, "partition_size": (2, 3)}
# What runs on a CPU without a compiler; the others are counted only.
RUNNING = [name for name, provider in PROVIDERS.items() if provider.runs_on("cpu") and not provider.compiles]
MAPS = [(32, 32), (64, 128), (128, 128), (128, 256)]


def forms(names: Iterable[str], **widths: Any) -> list[tuple[str, Level, Pass]]:
    """Every provider at every level and pass at which it has a form, on a map that P divides."""
    cells = product(names, LEVELS, PASSES)
    return [cell for cell in cells if PROVIDERS[cell[0]].obstacle(Workload(*cell[1:], 24, 48, **widths)) is None]


def counted(name: str, level: Level, pass_: Pass, height: int, width: int, **widths: Any) -> tuple[int, int]:
    return count(partial(step, PROVIDERS[name], Workload(level, pass_, height, width, **widths)))


# -- FLOPs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("map_", MAPS)
@pytest.mark.parametrize(("name", "partition_size"), [("dense", None), ("unfused", (8, 8)), ("isa", (8, 8))])
def test_forward_flops_are_the_closed_form(
    name: str, partition_size: tuple[int, int] | None, map_: tuple[int, int]
) -> None:
    flops, _ = counted(name, "attention", "forward", *map_, **PAPER)
    assert flops == pytest.approx(closed_form_flops(map_[0] * map_[1], 256, 512, "forward", partition_size), rel=1e-3)


def test_the_flops_ratio_at_128x128_is_the_papers() -> None:
    dense, isa = (counted(name, "attention", "forward", 128, 128, **PAPER)[0] for name in ("dense", "isa"))
    assert dense / isa == pytest.approx(51.2, rel=1e-3)


def test_training_flops_are_three_forward_passes_and_what_is_computed_again() -> None:
    pixels, k, v = 64 * 64, 256, 512
    names = [name for name, level, pass_ in forms(PROVIDERS) if (level, pass_) == ("attention", "training")]
    flops = {name: counted(name, "attention", "training", 64, 64, **PAPER)[0] for name in names}
    assert flops["dense"] == closed_form_flops(pixels, k, v, "training")
    assert flops["unfused"] == closed_form_flops(pixels, k, v, "training", (8, 8))
    scores_again = closed_form_flops(pixels, k, 0, "forward", (8, 8))
    assert flops["isa"] == closed_form_flops(pixels, k, v, "training", (8, 8)) + scores_again
    assert flops["isa-triton"] == flops["isa"]
    # value width 512 is two chunks of 256, each of them 2 matmuls forward and 5 backward
    assert flops["dense-sdpa"] == 2 * 7 * closed_form_flops(pixels, k, 0)


@pytest.mark.parametrize(("name", "level", "pass_"), forms(RUNNING, **SMALL | {"channels": 32}))
@pytest.mark.slow
def test_counts_are_torchs_and_fake_tensors_count_as_real_ones(name: str, level: Level, pass_: Pass) -> None:
    workloads = [Workload(level, pass_, *map_, **SMALL | {"channels": 32}) for map_ in ((12, 18), (7, 11))]
    for workload in workloads:
        if PROVIDERS[name].obstacle(workload):
            continue
        make = partial(step, PROVIDERS[name], workload)
        with Counter() as real:
            make()()
        with FlopCounterMode(display=False) as torchs:
            make()()
        assert count(make) == (real.flops, real.peak_bytes)
        assert real.flops == torchs.get_total_flops()


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pass_", "side", "least"),
    [
        ("isa", "forward", 128, 10),
        ("isa", "forward", 256, 40),
        ("isa", "training", 128, 7),
        ("isa-triton", "forward", 128, 15),
        ("isa-triton", "forward", 256, 60),
        ("isa-triton", "training", 128, 11),
    ],
)
def test_dense_attention_needs_many_times_the_memory(name: str, pass_: Pass, side: int, least: float) -> None:
    dense, ours = (counted(each, "attention", pass_, side, side, **PAPER)[1] for each in ("dense", name))
    assert dense >= least * ours


@pytest.mark.parametrize("name", [name for name, *form in forms(PROVIDERS) if form == ["attention", "training"]])
def test_memory_grows_with_the_pixels_or_with_their_square(name: str) -> None:
    small, large = (counted(name, "attention", "training", side, side, **PAPER)[1] for side in (64, 128))
    growth = large / small  # for 4 times the pixels
    assert growth > 12 if name == "dense" else growth < 6


@pytest.mark.parametrize(("name", "level", "pass_"), forms(RUNNING))
def test_peak_bytes_are_those_really_allocated(name: str, level: Level, pass_: Pass) -> None:
    make = partial(step, PROVIDERS[name], Workload(level, pass_, 24, 40, 64, 32, 64))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        make()()
    events = profiler.profiler.kineto_results.events()
    live = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        live += change
        peak = max(peak, live)
    # what kernels of torch allocate for themselves: sdpa, 3x3 convolutions, a convolution's gradient
    scratch = (
        3 << 20
        if name in ("dense-sdpa", "timm", "ppm", "aspp") or level == "head" or (level, pass_) == ("module", "training")
        else 1 << 12
    )
    assert 0 <= peak - count(make)[1] <= scratch


# -- seconds -----------------------------------------------------------------------------------------------------------


def test_rounds_go_back_and_forth_and_a_slow_step_is_not_repeated() -> None:
    calls: list[str] = []
    steps = {name: partial(_noted, calls, name) for name in "ab"}
    assert seconds(steps, rounds=2).keys() == {"a", "b"}
    assert calls == list("abbaab")  # the first round is a warm-up
    for budget in (1e-9, 0.0):
        calls.clear()
        assert seconds(steps, rounds=2, budget=budget).keys() == {"a", "b"}
        assert calls == list("ab")


def _noted(calls: list[str], name: str) -> tuple[torch.Tensor, ...]:
    calls.append(name)
    return ()


# -- providers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "map_"), [("dense", "dense-sdpa", (7, 11)), ("unfused", "isa", (8, 18)), ("timm", "isa", (8, 18))]
)
@pytest.mark.parametrize("pass_", PASSES)
def test_providers_of_one_function_agree(one: str, other: str, map_: tuple[int, int], pass_: Pass) -> None:
    workload = Workload("attention", pass_, *map_, dtype=torch.float64, **SMALL)
    for ours, theirs in zip(*(step(PROVIDERS[name], workload)() for name in (one, other)), strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, *form in forms(RUNNING) if form == ["module", "forward"]])
def test_modules_keep_the_map(name: str) -> None:
    (output,) = step(PROVIDERS[name], Workload("module", "forward", 8, 24, 32, 8, 16))()
    assert output.shape == (1, 32, 8, 24)


@pytest.mark.parametrize(("name", "stages"), [("dense", 1), ("dense-sdpa", 1), ("unfused", 2), ("isa", 2)])
def test_modules_have_the_papers_parameters(name: str, stages: int) -> None:
    module = PROVIDERS[name].build(Workload("module", "forward", 8, 8))
    assert isinstance(module, torch.nn.Module)
    assert sum(parameter.numel() for parameter in module.parameters()) == stages * 920_576


def test_criss_cross_meets_a_row_and_a_column_and_cgnl_one_key_a_pixel() -> None:
    pixels, widths = 64 * 128, 256 + 512
    rcca, cgnl, cgnlx = (
        counted(name, "attention", "forward", 64, 128, **PAPER)[0] for name in ("rcca", "cgnl", "cgnlx")
    )
    assert rcca == 2 * 2 * widths * pixels * (64 + 128)
    assert cgnl == 2 * widths * pixels
    assert cgnlx == 4 * cgnl


def test_a_provider_without_a_form_says_why() -> None:
    absent = replace(PROVIDERS["timm"], package="no_such_package")
    assert absent.obstacle(Workload("attention", "forward", 8, 8)) == (
        "needs no_such_package, which is not installed (pip install no_such_package)"
    )
    cases = {
        ("ppm", "attention", "forward", 64): "ppm has no form of its own at attention level",
        ("timm", "attention", "forward", 97): "timm takes maps that 8x8 divides",
        ("flex", "attention", "training", 64): "flex is measured forward only",
    }
    for (name, level, pass_, width), message in cases.items():
        with pytest.raises(ValueError, match=message):
            PROVIDERS[name].build(Workload(level, pass_, 64, width))


# -- files and the command line ----------------------------------------------------------------------------------------


WHERE: dict[str, Any] = {"host": "an abacus", "threads": 2, "versions": "torch 2", "date": "2026-11-26"}
WHAT = Cost("isa", "module", "training", 97, 98, 512, 256, 512, "8x4", "float32", "cpu")
HOW: dict[str, Any] = {"how": "graph", "allocated_bytes": 2**34, "clocks": "SM 1755 of 1980 MHz, memory 2619 MHz"}
ROW = replace(WHAT, flops=10**12, peak_bytes=2**33, seconds=0.25, spread=0.1, samples=5, **HOW, **WHERE)


def test_the_csv_has_its_columns_and_reads_back(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, seconds=None, spread=None, samples=None, note="would take about 7 s"), WHAT]
    assert {row.cell for row in rows} == {WHAT}
    write(tmp_path / "new" / "scaling.csv", Cost, rows)
    assert (tmp_path / "new" / "scaling.csv").read_text().splitlines()[0] == (
        "provider,level,pass,height,width,channels,key_channels,value_channels,partition_size,dtype,device,"
        "flops,peak_bytes,seconds,spread,samples,note,how,allocated_bytes,clocks,host,threads,versions,date,depth"
    )
    assert read(tmp_path / "new" / "scaling.csv", Cost) == rows


def test_the_csv_is_whole_or_as_it_was(tmp_path: Path) -> None:
    def broken() -> Iterator[Cost]:
        yield ROW
        raise KeyboardInterrupt

    write(tmp_path / "scaling.csv", Cost, [ROW])
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "scaling.csv", Cost, broken())
    assert read(tmp_path / "scaling.csv", Cost) == [ROW]
    assert [path.name for path in tmp_path.iterdir()] == ["scaling.csv"]


def test_a_csv_with_other_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("provider,flops\nisa,1\n")
    with pytest.raises(ValueError, match="must have the columns provider,level,pass"):
        read(tmp_path / "other.csv", Cost)


@pytest.mark.parametrize(
    ("column", "text", "words"),
    [
        ("seconds", "nan", "seconds must be a finite number from 0, got nan"),
        ("seconds", "-1", "seconds must be a finite number from 0, got -1.0"),
        ("peak_bytes", "-8", "peak_bytes must be a finite number from 0, got -8"),
        ("height", "-97", "height must be at least 1, got -97"),
        ("partition_size", "eight", "partition_size must be HEIGHTxWIDTH, as 8x8, got 'eight'"),
    ],
)
def test_a_row_that_nobody_can_have_measured_is_refused(tmp_path: Path, column: str, text: str, words: str) -> None:
    path = tmp_path / "scaling.csv"
    write(path, Cost, [ROW])
    header, line = (each.split(",") for each in path.read_text().splitlines())
    line[header.index(column)] = text
    path.write_text(f"{','.join(header)}\n{','.join(line)}\n")
    with pytest.raises(ValueError, match=rf"scaling\.csv, line 2, must hold one .*: {re.escape(words)}$"):
        read(path, Cost)


TINY = ["--channels=8", "--key-channels=4", "--value-channels=6", "--rounds=1"]
SCALING = ["scaling", "--partition-size=2x3", *TINY]


@pytest.mark.slow
def test_scaling_writes_its_csv_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [name for name in PROVIDERS if not PROVIDERS[name].compiles]
    main([*SCALING, "--out", str(tmp_path), "--sizes", "7x11", "12x9", "--verbose", "--providers", *names])
    rows = read(tmp_path / "scaling.csv", Cost)
    assert {row.size for row in rows} == {(7, 11), (12, 9)}
    assert {row.partition_size for row in rows} == {"2x3"}
    everywhere = [row.provider for row in rows if (row.level, row.pass_, row.size) == ("module", "training", (7, 11))]
    assert everywhere == [name for name in names if name not in ("cgnl", "cgnlx", "timm", "natten")]
    assert all(row.flops > 0 and row.peak_bytes > 0 for row in rows)
    assert all((row.seconds is not None) == (row.provider in RUNNING) for row in rows)
    assert all(row.how == "clock" * (row.seconds is not None) for row in rows)
    assert {(row.allocated_bytes, row.clocks) for row in rows} == {(None, "")}
    assert all((row.samples or 0) >= 2 for row in rows if row.seconds)
    assert all(row.host and row.threads and "torch " in row.versions and row.date for row in rows)
    assert {path.name for path in tmp_path.glob("*.png")} == {"scaling.png", "flops.png", "memory.png", "time.png"}
    printed = capsys.readouterr().out
    assert "attention level, forward" in printed
    assert "timm takes multiples of 32 channels" in printed


def test_scaling_does_not_run_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--providers", "dense", "isa", "--levels", "attention", "--passes", "forward", "--sizes", "64", "128"]
    main([*SCALING, "--out", str(tmp_path), *only, "--memory-limit", "0.0005", "--verbose"])
    dense, isa = read(tmp_path / "scaling.csv", Cost)[2:]
    assert (dense.seconds, dense.note) == (None, "would need 2.1 GB")
    assert dense.peak_bytes > 2 * 4 * 128**4  # two copies of the scores, which no one ever made
    assert (isa.seconds, isa.note) == (None, "would need 0.0 GB")
    assert "dense, attention forward 64x64: would need 0.1 GB" in capsys.readouterr().out


def test_scaling_measures_only_what_its_csv_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = ["--out", str(tmp_path), "--levels", "attention", "--passes", "forward", "--providers"]
    monkeypatch.setattr("bench.scaling.draw", lambda *_: [])  # elsewhere
    timed: list[set[str]] = []

    def timing(steps: dict[str, Any], **_: Any) -> dict[str, Samples]:
        timed.extend([set(steps)] if steps else [])
        return {name: Samples((1.0, 1.0), "clock") for name in steps}

    monkeypatch.setattr(measure, "samples", timing)
    monkeypatch.setattr(measure, "matmul_rate", lambda *_: 1e9)
    main([*SCALING, *only, "unfused", "isa", "--sizes", "6", "7x11"])
    first = read(tmp_path / "scaling.csv", Cost)
    timed.clear()
    main([*SCALING, *only, "isa", "--sizes", "7x11"])
    assert timed == []
    assert sorted(read(tmp_path / "scaling.csv", Cost), key=str) == sorted(first, key=str)
    main([*SCALING, *only, "isa", "dense", "--sizes", "6"])
    assert timed == [{"isa", "dense"}]  # times of one map come from one run
    rows = {(row.provider, row.size): row.seconds for row in read(tmp_path / "scaling.csv", Cost)}
    assert rows[("isa", (6, 6))] == rows[("dense", (6, 6))] == 1.0
    assert rows[("isa", (7, 11))] == first[3].seconds
    main([*SCALING, *only, "isa", "--sizes", "6", "--partition-size", "3x2"])
    assert timed[1:] == [{"isa"}]
    assert len(read(tmp_path / "scaling.csv", Cost)) == 6
    main([*SCALING, *only, "isa", "--sizes", "6", "--fresh"])
    assert len(read(tmp_path / "scaling.csv", Cost)) == 1


@pytest.mark.parametrize("name", ["unfused", "isa"])
def test_what_is_compiled_is_counted_as_it_is_and_called_before_it_is_timed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    compiler = {"compiled": 0}

    def compiling(function: Any, **options: Any) -> Any:
        compiler["compiled"] += 1
        assert options == {"dynamic": False}

        def compiled(*inputs: Tensor) -> Tensor:
            calls.append("call")
            return function(*inputs)

        return compiled

    def timing(steps: dict[str, Any], **_: Any) -> dict[str, Samples]:
        calls.append("timed")
        return {name: Samples((1.0, 1.0), "clock") for name in steps}

    monkeypatch.setattr(torch, "compile", compiling)
    assert counted(f"{name}-compiled", "attention", "training", 6, 6) == counted(name, "attention", "training", 6, 6)
    assert compiler["compiled"] == 0
    monkeypatch.setattr(measure, "samples", timing)
    monkeypatch.setattr(measure, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr("bench.scaling.draw", lambda *_: [])
    only = ["--levels", "attention", "--passes", "forward", "--sizes", "6", "--providers", name, f"{name}-compiled"]
    main([*SCALING, "--out", str(tmp_path), *only, "--twice"])
    assert calls == ["call", "call", "timed"]
    assert compiler["compiled"] == 2
    rows = read(tmp_path / "scaling.csv", Cost)
    assert [row.provider for row in rows] == [name, f"{name}-compiled", f"{name}-again", f"{name}-compiled-again"]
    assert len({(row.flops, row.peak_bytes) for row in rows}) == 1


def test_scaling_of_nobody_says_so_and_draws_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only = ["--sizes", "6", "--providers", "ppm", "--levels", "attention"]
    main([*SCALING, "--out", str(tmp_path), *only, "--verbose"])
    assert "ppm has no form of its own at attention level" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["scaling.csv"]


def test_what_is_no_csv_of_ours_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "scaling.csv").write_text("provider,flops\nisa,1\n")
    with pytest.raises(SystemExit):
        main([*SCALING, "--out", str(tmp_path), "--sizes", "6", "--providers", "isa"])
    assert "must have the columns provider,level,pass" in capsys.readouterr().err
    assert (tmp_path / "scaling.csv").read_text() == "provider,flops\nisa,1\n"


@pytest.mark.slow
def test_partitions_writes_its_csv_and_a_plot(tmp_path: Path) -> None:
    sizes = ["--size", "8x12", "--partition-sizes", "1x2", "4", "--partition-size", "2x3", "--passes", "forward"]
    main(["partitions", *TINY, "--out", str(tmp_path), *sizes])
    assert {path.name for path in tmp_path.iterdir()} == {"partitions.csv", "partition_sizes_forward.png"}
    rows = read(tmp_path / "partitions.csv", Cost)
    flops = {(row.provider, row.partition_size): row.flops for row in rows if row.level == "attention"}
    for window, area in (("1x2", 2), ("2x3", 6), ("4x4", 16)):
        long, short = 2 * (4 + 6) * 96 * 96 // area, 2 * (4 + 6) * 96 * area
        assert (flops["long", window], flops["short", window]) == (long, short)
        assert flops["long-short", window] == flops["short-long", window] == long + short
    assert [row.partition_size for row in rows if row.provider.startswith("module")] == ["2x3"] * 3
    picture = tmp_path / "partition_sizes_forward.png"
    picture.unlink()
    main(
        ["partitions", *TINY, "--out", str(tmp_path), *sizes[:-1], "training", "forward", "--redraw"]
    )  # none of training
    assert {path.name for path in tmp_path.glob("*.png")} == {picture.name}


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path: Path) -> None:
    main(["pictures", "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {
        "partitions.png",
        "constructors.png",
        "supports.png",
        "photo.png",
    }


LOADED = """
import sys
from bench.__main__ import COMMANDS, OF_KERNELS, main
try:
    main(sys.argv[1:])
except SystemExit as stopped:
    print({"torch", "matplotlib", "rich", "triton"} & set(sys.modules), stopped.code)
"""


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["fly"], 2), ([], 2)])
def test_help_and_a_wrong_command_load_neither_torch_nor_matplotlib(arguments: list[str], code: int) -> None:
    words = [sys.executable, "-c", LOADED, *arguments]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == f"set() {code}", done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python -m bench {command} ")
    assert "-m bench" in said.removeprefix("usage: python -m bench")  # its docstring too


@pytest.mark.parametrize("command", OF_KERNELS)
def test_a_command_that_looks_at_kernels_says_that_triton_is_missing(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(SystemExit) as stopped:
        main([command])
    assert stopped.value.code == 2
    assert f"{command} looks at kernels and needs triton, which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "expected"), [("64", (64, 64)), ("64x128", (64, 128)), ("7X5", (7, 5))])
def test_sizes_are_a_side_or_height_and_width(text: str, expected: tuple[int, int]) -> None:
    assert size(text) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (
            ["scaling", "--sizes", "64x"],
            "--sizes: must be a side, HEIGHTxWIDTH or DEPTHxHEIGHTxWIDTH, got '64x'",
        ),
        (["scaling", "--sizes", "1x2x3"], "--sizes must have one side or 2, as --axes says, got 3"),
        (["scaling", "--axes", "3", "--sizes", "16x16"], "--sizes must have one side or 3, as --axes says, got 2"),
        (["scaling", "--sizes", "0"], "must be a side, HEIGHTxWIDTH or"),
        (["scaling", "--providers", "densest"], "invalid choice: 'densest'"),
        (["scaling", "--rounds", "0"], "--rounds: must be a whole number from 1, got '0'"),
        (["scaling", "--device", "abacus"], "--device: must be a device of this machine, got 'abacus'"),
        (["scaling", "--passes", "backward"], "invalid choice: 'backward'"),
        (["scaling", "--sizes", "6", "--partition-size", "8"], "--partition-size 8x8 is larger than the map 6x6"),
        (["scaling", "--redraw", "--out", "nowhere"], "scaling.csv has no row of these workloads"),
        (["sharding", "--redraw", "--out", "nowhere"], "sharding.csv is not there"),
        (["partitions", "--size", "9", "--partition-sizes", "16"], "--partition-size 16x16 is larger than the map 9x9"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_no_timed_call_adds_to_the_gradients_of_the_one_before() -> None:
    layer, x = torch.nn.Conv2d(3, 4, 1), torch.randn(2, 3, 5, 7, requires_grad=True)
    step = measure.training(lambda: layer(x), (x, *layer.parameters()), torch.ones(2, 4, 5, 7))
    assert all(torch.equal(a, b) for a, b in zip(step(), step(), strict=True))
    assert all(leaf.grad is None for leaf in (x, *layer.parameters()))
