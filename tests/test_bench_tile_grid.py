"""The grid of the field's widths and windows: its cells, the classes that share tiles, their bounds, and the sweep."""

from __future__ import annotations

import argparse
import re
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bench.terminal import Table
from bench.tiles import bounds, grid, sweep
from bench.tiles.binaries import Binary
from bench.tiles.bounds import HEADER, Cell
from bench.tiles.compile import Launch, Problem, pass_launches
from bench.tiles.grid import Class, classes, make_cell
from bench.tiles.options import make_problem
from bench.tiles.report import Pass
from bench.tiles.roofline import MACHINES
from bench.tiles.search import Finding, write
from bench.tiles.sweep import Choice, ClassTask, Score
from isa_triton import tiles
from isa_triton.tiles import Tile
from tests.test_bench_tile_search import BEST, H100, Planted, PlantedLaunch, run_planted

# -- roofs -------------------------------------------------------------------------------------------------------------


def test_exponentials_a_clock_are_those_of_the_programming_guides() -> None:
    """CUDA C++ Programming Guide, throughput of native arithmetic, compute capabilities 8.0 to 12.x; AMD: a quarter."""
    assert {machine.target: machine.special for machine in MACHINES.values()} == {
        "sm_80": 16, "sm_86": 16, "sm_90": 16, "sm_100": 16, "gfx942": 4 * 16 // 4, "gfx1100": 4 * 32 // 4,
    }  # fmt: skip
    assert pytest.approx(132 * 16 * 1.83e9) == H100.exponentials


@pytest.mark.parametrize(
    ("tokens", "width", "pass_", "roof"),
    [(512, 32, "forward", "exp"), (64, 128, "forward", "DRAM"), (4096, 128, "backward", "matrix")],
)
def test_the_highest_of_three_roofs_is_the_bound(tokens: int, width: int, pass_: str, roof: str) -> None:
    problem = make_problem(tokens, width, width, "local", heads=3, maps=2)
    whole = Pass(problem, pass_, H100, [])
    pairs = 2 * 3 * 64 * tokens**2
    tensors = 4 if pass_ == "forward" else 7
    products = 2 if pass_ == "forward" else 5
    assert whole.roofs == {
        "DRAM": pytest.approx(2 * 3 * 64 * tokens * width * 2 * tensors / 3.35e12),
        "matrix": pytest.approx(products * 2 * pairs * width / 989.4e12),
        "exp": pytest.approx(pairs / (132 * 16 * 1.83e9)),
    }
    assert max(whole.roofs, key=whole.roofs.__getitem__) == roof


# -- cells and classes -------------------------------------------------------------------------------------------------


def test_the_grid_is_the_promised_one() -> None:
    cells = list(grid.cells("bf16"))
    assert {(p.key_width, p.value_width) for p, _ in cells} == {
        *((width, width) for width in (16, 24, 30, 32, 48, 64, 80, 96, 128)), (256, 512),
    }  # fmt: skip
    assert {p.partition.tokens for p, _ in cells} == {
        16, 36, 49, 64, 100, 144, 196, 256, 343, 392, 512, 576, 1024, 4096,
    }  # fmt: skip
    assert Counter(pass_ for _, pass_ in cells) == {"forward": 10 * 14 * 2, "backward": 10 * 14 * 2}
    assert len(set(cells)) == len(cells)
    assert grid.TARGETS == ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")


def test_every_cell_has_about_as_many_pixels() -> None:
    for problem, _ in grid.cells("bf16"):
        height, width = problem.partition.size
        assert 0.95 < problem.maps * height * width / grid.PIXELS < 1.05


def test_classes_hold_every_cell_once() -> None:
    found = [(problem, each.pass_) for each in classes("bf16") for problem in each.problems]
    assert sorted(map(str, found)) == sorted(map(str, grid.cells("bf16")))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped files, which may be written to."""
    shutil.copytree(tiles.FOLDER, tmp_path / "tiles")
    monkeypatch.setattr(tiles, "FOLDER", tmp_path / "tiles")
    for cached in (tiles._lookup, tiles._entries):
        cached.cache_clear()
    return tmp_path / "tiles"


def test_what_is_written_for_a_class_serves_all_its_cells_and_no_others(folder: Path) -> None:
    wanted = [each for each in classes("bf16", widths=(24, 256)) if each.pass_ == "forward"]
    for number, each in enumerate(wanted, 1):  # every class another tile
        tile, (lead, *_) = Tile(16, 16, 16, 16, 1, number), each.problems
        found = Finding(ClassTask(H100, lead, "forward"), tile, None, [], None, measured=1e-6)
        write([found], without_bias=not lead.bias)
    for number, each in enumerate(wanted, 1):
        served = {tiles.lookup("sm_90", "forward", *p.sizes, p.bias).num_stages for p in each.problems}
        assert served == {number}


# -- the sweep ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlantedTask(ClassTask):
    def launch(self, tile: Tile) -> Launch:
        kernel = "isa_triton.backend.kernels.forward", "forward_kernel"
        return PlantedLaunch("sm_90", self.problem, *kernel, 132 * 100, {}, {"tile": tile})


@dataclass
class Spoilt(Planted):
    """Stands in for compilers; problems of some dtypes and tokens spill with the best tile's number of warps."""

    spoilt: tuple[tuple[str, int], ...] = ()

    def known(self, launch: Launch) -> Binary | None:
        tile, problem = launch.options["tile"], launch.problem
        spills = (problem.dtype, problem.partition.tokens) in self.spoilt and tile.num_warps == BEST.num_warps
        return replace(self.binary(tile), spill_bytes=8, spill_accesses=2) if spills else self.binary(tile)


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch) -> Class:
    """A class whose launches have the binaries of `Planted`, and which nothing serves yet."""
    monkeypatch.setattr(sweep, "ClassTask", PlantedTask)
    monkeypatch.setattr(sweep, "forward_launches", lambda *_, **__: [])
    now = Finding(PlantedTask(H100, make_problem(64, 64, 64), "forward"), BEST, None, ["spills"], None, measured=1.0)
    monkeypatch.setattr(sweep, "_now", lambda _, cells, __: [dict.fromkeys(cells.problems, now)])
    (found,) = (
        each for each in classes("bf16", widths=(64,), tokens=(49, 64))
        if each.pass_ == "forward" and not each.problems[0].bias
    )  # fmt: skip
    return found


def test_a_sweep_finds_the_best_tile_of_a_class(cells: Class) -> None:
    found = sweep.sweep(H100, cells, Spoilt())
    assert [finding.tile for finding in found.plan] == [BEST]
    assert (found.now.unsound, found.then.unsound) == (2, 0)
    assert found.is_better
    assert [finding.tile for finding in found.news] == [BEST]
    assert f"forward {sweep.format_tile(BEST)}" in found.result


@pytest.mark.parametrize("spoilt", [("bfloat16", 64), ("bfloat16", 49), ("float16", 64)], ids=str)
def test_a_tile_that_spills_in_one_cell_or_in_fp16_is_not_taken(spoilt: tuple[str, int], cells: Class) -> None:
    found = sweep.sweep(H100, cells, Spoilt(spoilt=(spoilt,)))
    assert all(finding.tile.num_warps != BEST.num_warps for finding in found.plan)
    assert found.then.unsound == 0 if found.plan else not found.is_better


def test_where_no_tile_is_sound_in_all_cells_the_one_that_is_in_most_is_taken(cells: Class) -> None:
    class Never(Spoilt):
        def known(self, launch: Launch) -> Binary | None:
            binary = self.binary(launch.options["tile"])
            return replace(binary, spill_accesses=2) if launch.problem.partition.tokens == 49 else binary

    found = sweep.sweep(H100, cells, Never())
    assert [finding.tile for finding in found.plan] == [BEST]
    assert found.then.unsound == 1
    assert "(1 cells not sound)" in found.result


def test_known_tiles_alone_are_tried_where_that_is_wanted(cells: Class) -> None:
    planted = Spoilt()
    sweep.sweep(H100, cells, planted, known=True)
    assert planted.seen.keys() == {*PlantedTask(H100, cells.problems[0], "forward").shipped()}  # of the longest groups


def test_a_way_that_is_not_one_kernel_is_written_so_that_it_is_taken(folder: Path) -> None:
    cells = next(each for each in classes("bf16", widths=(64,), tokens=(64,)) if each.pass_ == "backward")
    lead, tile = cells.problems[0], Tile(64, 64, 16, 16, 2, 5)
    assert lead.bias
    plan = tuple(
        Finding(ClassTask(H100, lead, step), tile, None, [], None, measured=1e-5)
        for step in ("queries", "keys", "pairs")
    )
    choice = Choice(H100, cells, Score(0, 3.0), Score(0, 2.0), plan)
    assert choice.is_better
    write(choice.news)
    found = tiles.backward("sm_90", *lead.sizes)
    assert (found.group, found.columns, found.queries, found.keys, found.values) == (None, None, tile, tile, None)
    assert not Choice(H100, cells, Score(0, 2.0), Score(0, 1.99), plan).is_better
    assert not Choice(H100, cells, Score(0, 2.0), Score(1, 1.0), plan).is_better


def test_what_is_written_without_a_bias_serves_such_calls_alone(folder: Path) -> None:
    lead = make_cell(256, (64, 64), False, "bf16")
    before = tiles.backward("sm_90", *lead.sizes)
    tile = Tile(256, 64, 64, 64, 8, 5)
    write([Finding(ClassTask(H100, lead, "columns"), tile, None, [], None, measured=1e-5)], without_bias=True)
    assert tiles.backward("sm_90", *lead.sizes) == before
    assert tiles.backward("sm_90", *lead.sizes, bias=False).columns == tile
    (launch,) = pass_launches("sm_90", lead, "backward")
    assert (launch.step, launch.tile, launch.origin) == ("columns", tile, "its own entry")
    assert launch.arguments["delta"] is None


# -- files -------------------------------------------------------------------------------------------------------------


def rows_of(targets: tuple[str, ...], us: str = "1.0") -> Table:
    line = {
        **dict.fromkeys(HEADER, "1"),
        "us": us,
        "pass": "forward",
        "K": "16",
        "V": "16",
        "tokens": "49",
        "bias": "none",
    }
    rows = [list((line | {"target": target, "dtype": "tf32"}).values()) for target in targets]
    return Table("", HEADER, rows)


def test_rows_of_other_targets_stay_and_those_of_the_same_are_replaced(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "tile_bounds.csv"
    bounds.write(file, rows_of(("sm_90", "gfx942")))
    bounds.write(file, rows_of(("sm_80", "sm_90"), us="2.0"))
    assert [(row["target"], row["us"]) for row in bounds.read(file)] == [
        ("sm_80", "2.0"), ("sm_90", "2.0"), ("gfx942", "1.0"),
    ]  # fmt: skip


def test_a_file_that_is_no_table_of_bounds_is_named(tmp_path: Path) -> None:
    (tmp_path / "tile_bounds.csv").write_text("target,us\nsm_90,1\n")
    with pytest.raises(argparse.ArgumentError, match="has not the columns target, dtype"):
        bounds.read(tmp_path / "tile_bounds.csv")
    with pytest.raises(argparse.ArgumentError, match="there is no"):
        bounds.read(tmp_path / "nowhere.csv")


def test_a_picture_has_a_row_of_panels_a_target(tmp_path: Path) -> None:
    bounds.write(tmp_path / "tile_bounds.csv", rows_of(("sm_80", "sm_90")))
    figure = bounds.draw(bounds.read(tmp_path / "tile_bounds.csv"))
    titles = [panel.get_title() for panel in figure.axes if panel.get_title()]
    assert titles[::4] == [f"{target} tf32, forward, no bias: median 1.00" for target in ("sm_80", "sm_90")]
    assert len(titles) == 8


def test_a_cell_that_cannot_run_holds_nothing() -> None:
    problem: Problem = make_cell(64, (64, 64), False, "bf16")
    cell = Cell(Pass(problem, "forward", H100, []), "forward does not fit", broken=True)
    row = dict(zip(HEADER, cell.row, strict=True))
    assert (row["us"], row["ratio"], row["holds"], row["violations"]) == (None, None, "no", "forward does not fit")
    assert "worst inf" in next(bounds.summary([cell]))


def test_the_committed_table_has_every_cell_of_its_targets() -> None:
    rows = bounds.read(Path(__file__).parent.parent / "bench" / "results" / "tile_bounds.csv")
    wholes = Counter((row["target"], row["dtype"]) for row in rows)
    assert ("sm_90", "bfloat16") in wholes
    assert set(wholes.values()) == {len(list(grid.cells("bf16")))}


@pytest.mark.slow
def test_a_sweep_gains_nothing_the_second_time(tmp_path: Path) -> None:
    """Where all binaries are alike, the second time as many programs."""
    command = ["tiles", "sweep", "--widths", "16", "--tokens", "16", "100", "--write"]
    done = run_planted(tmp_path, [command, command])
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (line for line in done.stdout.splitlines() if "classes searched" in line)
    assert re.fullmatch("PREDICTED: 8 of 8 classes searched, [1-8] of them with better tiles", first)
    assert second == "PREDICTED: 8 of 8 classes searched, 0 of them with better tiles"
