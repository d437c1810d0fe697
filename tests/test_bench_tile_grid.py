"""The grid of the field's widths and windows: its cells, the classes that share tiles, their bounds, and the sweep."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bench.terminal import Table
from bench.tiles import bounds, grid, sweep
from bench.tiles.binaries import Binary
from bench.tiles.bounds import HEADER, Cell
from bench.tiles.compile import Launch, Problem, pass_launches
from bench.tiles.grid import make_cell
from bench.tiles.options import make_problem
from bench.tiles.report import Pass
from bench.tiles.roofline import MACHINES
from bench.tiles.search import Finding, Search, write
from bench.tiles.sweep import CellTask
from isa_triton import tiles
from isa_triton.tiles import Tile
from tests.compiling import run_compiling
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


def test_a_sweep_takes_every_cell_once_and_the_longest_groups_of_a_width_first() -> None:
    found = list(grid.in_turn("bf16", {k for k, _ in grid.WIDTHS}, grid.TOKENS))
    assert sorted(map(str, found)) == sorted(map(str, grid.cells("bf16")))
    for width in (32, 256):
        tokens = [problem.partition.tokens for problem, _ in found if problem.key_width == width]
        assert tokens == sorted(tokens, reverse=True)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the shipped files, which may be written to."""
    shutil.copytree(tiles.FOLDER, tmp_path / "tiles")
    monkeypatch.setattr(tiles, "FOLDER", tmp_path / "tiles")
    forget()
    yield tmp_path / "tiles"
    forget()


def forget() -> None:
    """What was looked up before."""
    for cached in (tiles._lookup, tiles._entries):
        cached.cache_clear()


def test_what_is_written_for_a_cell_serves_it_whatever_is_written_for_others(folder: Path) -> None:
    wanted = [problem for problem, pass_ in grid.in_turn("bf16", (24, 256), grid.TOKENS) if pass_ == "forward"]
    for number, problem in enumerate(wanted, 1):  # every cell another tile
        tile = Tile(16, 16, 16, 16, 1, number)
        found = Finding(CellTask(H100, problem, "forward"), tile, None, [], None, measured=1e-6)
        write([found], without_bias=not problem.bias)
    for number, p in enumerate(wanted, 1):
        assert tiles.lookup("sm_90", "forward", *p.sizes, p.bias).num_stages == number


# -- the sweep ---------------------------------------------------------------------------------------------------------


class CellLaunch(PlantedLaunch):
    """Its binary depends on the problem too."""

    key = property(lambda self: f"{self.options['tile']} {self.problem}")


@dataclass(frozen=True)
class PlantedTask(CellTask):
    def launch(self, tile: Tile) -> Launch:
        kernel = "isa_triton.backend.kernels.forward", "forward_kernel"
        return CellLaunch("sm_90", self.problem, *kernel, 132 * 100, {}, {"tile": tile})


@dataclass
class Spoilt(Planted):
    """Stands in for compilers; problems of a dtype spill with the best tile's number of warps."""

    spoilt: str = ""

    def known(self, launch: Launch) -> Binary | None:
        tile, problem = launch.options["tile"], launch.problem
        spills = problem.dtype == self.spoilt and tile.num_warps == BEST.num_warps
        return replace(self.binary(tile), spill_bytes=8, spill_accesses=2) if spills else self.binary(tile)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Problem:
    """A cell whose launches have the binaries of `Planted`, and whose shipped tile is slow."""
    monkeypatch.setattr(sweep, "CellTask", PlantedTask)
    monkeypatch.setattr(sweep, "Task", PlantedTask)
    monkeypatch.setattr(sweep, "forward_launches", lambda *_, **__: [])
    monkeypatch.setattr(sweep, "pass_launches", lambda *_: [SLOW])
    return make_cell(64, (64, 64), False, "bf16")


SLOW = PlantedTask(H100, make_cell(64, (64, 64), False, "bf16"), "forward").launch(Tile(16, 16, 16, 16, 8, 1))
SLOW = SLOW._replace(arguments={"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "BLOCK_V": 16},
                     options={**SLOW.options, "num_warps": 8, "num_stages": 1})  # fmt: skip


def test_a_sweep_finds_the_best_tile_of_a_cell(cell: Problem) -> None:
    found = sweep.sweep(H100, cell, "forward", Spoilt())
    assert [finding.tile for finding in found.chosen] == [BEST]
    assert [finding.tile for finding in sweep.worth_writing(found)] == [BEST]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_tile_that_spills_in_bf16_or_fp16_is_not_taken(dtype: str, cell: Problem) -> None:
    found = sweep.sweep(H100, cell, "forward", Spoilt(spoilt=dtype))
    assert all(finding.tile.num_warps != BEST.num_warps for finding in sweep.worth_writing(found))


def test_known_tiles_alone_are_tried_where_that_is_wanted(cell: Problem) -> None:
    planted = Spoilt()
    sweep.sweep(H100, cell, "forward", planted, known=True)
    assert planted.seen.keys() == {*PlantedTask(H100, cell, "forward").shipped(), SLOW.options["tile"]}


def searched(problem: Problem, us: dict[str, float], now: float, *violations: str) -> Search:
    """A search that found these kernels, where one of `now` microseconds serves."""
    tile = Tile(64, 64, 16, 16, 2, 5)
    chosen = [Finding(CellTask(H100, problem, step), tile, None, [], None, measured=1e-6 * t) for step, t in us.items()]
    shipped = Finding(CellTask(H100, problem, "group"), BEST, None, list(violations), None, measured=1e-6 * now)
    return Search(H100, problem, "backward", {}, chosen, [shipped])


def test_a_way_that_is_not_one_kernel_is_written_so_that_it_is_taken(folder: Path) -> None:
    problem, us = make_cell(64, (64, 64), True, "bf16"), {"queries": 3.0, "keys": 4.0, "pairs": 2.0}
    write(sweep.worth_writing(searched(problem, us, now=10.0)))
    found, tile = tiles.backward("sm_90", *problem.sizes), Tile(64, 64, 16, 16, 2, 5)
    assert (found.group, found.columns, found.queries, found.keys, found.values) == (None, None, tile, tile, None)


def test_only_what_gains_something_is_worth_an_entry() -> None:
    problem, us = make_cell(64, (64, 64), True, "bf16"), {"group": 9.0}
    assert sweep.worth_writing(searched(problem, us, now=9.1)) == []
    assert len(sweep.worth_writing(searched(problem, us, now=9.5))) == 1
    assert len(sweep.worth_writing(searched(problem, us, 9.1, "spills 8 bytes"))) == 1  # a sound one is, at any price
    assert sweep.worth_writing(searched(problem, {}, now=9.5)) == []


def test_what_is_written_without_a_bias_serves_such_calls_alone(folder: Path) -> None:
    lead = make_cell(256, (64, 64), False, "bf16")
    before = tiles.backward("sm_90", *lead.sizes)
    tile = Tile(256, 64, 64, 64, 8, 5)
    write([Finding(CellTask(H100, lead, "columns"), tile, None, [], None, measured=1e-5)], without_bias=True)
    assert tiles.backward("sm_90", *lead.sizes) == before
    assert tiles.backward("sm_90", *lead.sizes, bias=False).columns == tile
    (launch,) = pass_launches("sm_90", lead, "backward")
    assert (launch.step, launch.tile, launch.origin) == ("columns", tile, "its own entry")
    assert launch.arguments["delta"] is None


@pytest.mark.slow
def test_dq_dk_and_dv_at_once_move_nine_tensors_at_most(tmp_path: Path) -> None:
    """q, k, v, out, do, dq, dk and dv, and a number a token: where two passes ask for 16."""
    problem = ["--tokens", "256", "--widths", "64", "64", "--heads", "4", "--partition", "local", "--maps", "16"]
    tile = "BLOCK_M=256,BLOCK_N=64,BLOCK_K=64,BLOCK_V=64,num_warps=8,num_stages=3"
    step = ["--pass", "backward", "--step", "columns", "--tiles", tile, "--json", str(tmp_path / "one.json")]
    done = run_compiling("-m", "bench", "tiles", "report", *problem, *step, "--cache", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "one.json").read_text())
    tensor = 16 * 64 * 256 * 4 * 64 * 2
    assert 8 * tensor < found["bytes_asked"] < 8.1 * tensor
    assert 8 * tensor < found["bytes_distinct"] < 8.1 * tensor
    assert found["violations"] == []


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
    first, second = (line for line in done.stdout.splitlines() if "cells searched" in line)
    assert re.fullmatch("PREDICTED: 8 of 8 cells searched, [1-8] of them with better tiles", first)
    assert second == "PREDICTED: 8 of 8 cells searched, 0 of them with better tiles"
