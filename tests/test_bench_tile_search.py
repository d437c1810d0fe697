"""The search for tiles: its steps, its choice, what it says, and a search that is small enough to run here."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from html.parser import HTMLParser
from math import log2
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.terminal import Terminal
from bench.tiles import TOOLS, page, plot, verify
from bench.tiles import search as command
from bench.tiles.binaries import Access, Binaries, Binary
from bench.tiles.compile import NOT_SHIPPED, STEPS, Launch, format_tile, named
from bench.tiles.options import make_problem
from bench.tiles.program import Op
from bench.tiles.report import Pass
from bench.tiles.roofline import MACHINES
from bench.tiles.search import Finding, Search, Task, choose, search
from isa_triton import tiles
from isa_triton.tiles import Tile
from tests.compiling import ROOT, run_compiling
from tests.test_pages import COMMANDS

H100, PROBLEM = MACHINES["H100"], make_problem(64, 64, 64)
TILE = Tile(64, 64, 32, 32, 4, 2)

# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("gpu", ["A100", "B200", "MI300X", "RX7900XTX"])
def test_neighbours_differ_in_one_field_and_no_block_is_larger_than_what_it_cuts(step: str, gpu: str) -> None:
    task = Task(MACHINES[gpu], make_problem(49, 39, 64, bias=True), step)
    tile = task.clipped(Tile(256, 256, 512, 512))
    assert tile[:4] == (64, 64, 64, 64)
    neighbours = list(task.neighbours(tile))
    assert neighbours
    for other in neighbours:
        (change,) = [(a, b) for a, b in zip(tile, other, strict=True) if a != b]
        assert change[1] in (change[0] // 2, 2 * change[0], change[0] - 1, change[0] + 1)
        assert all(16 <= block <= 64 for block in other[:4])
        assert step != "group" or other.block_m == other.block_n == 64  # a group is one block


def test_what_cannot_fit_is_left_out() -> None:
    task = Task(H100, make_problem(1024, 256, 512), "forward")
    assert task.may_fit(Tile(64, 64, 64, 64, 4, 2))
    assert not task.may_fit(Tile(256, 256, 64, 64, 4, 2))  # 640 scores and sums a thread
    assert not task.may_fit(Tile(64, 256, 256, 64, 8, 4))  # three stages of 160 KB
    exact = Task(H100, make_problem(64, 64, 64, dtype="float32"), "forward")
    assert not exact.may_fit(Tile(64, 64, 64, 64, 1, 1))  # 8192 products a thread without matrix units


def test_a_search_starts_at_what_is_shipped() -> None:
    shipped = Task(H100, PROBLEM, "forward").shipped()
    assert shipped[0] == tiles.lookup("sm_90", "forward", 64, 64, "bfloat16", 64)
    assert all(tile.block_m <= 64 and tile.block_v <= 64 for tile in shipped)


# -- the search, on binaries whose best is known -----------------------------------------------------------------------

BEST = Tile(32, 64, 64, 16, 2, 3)


class PlantedLaunch(Launch):
    """Its binary depends on the tile only."""

    key = property(lambda self: str(self.options["tile"]))


@dataclass(frozen=True)
class PlantedTask(Task):
    def launch(self, tile: Tile) -> Launch:
        kernel = "isa_triton.backend.kernels.forward", "forward_kernel"
        return PlantedLaunch("sm_90", self.problem, *kernel, 132, {}, {"tile": tile})


@dataclass
class Planted(Binaries):
    """Stands in for compilers: the further a tile is from the best, the more its binary moves."""

    cache: Path = Path()
    pool: Any = None
    sound: bool = True
    seen: dict[Tile, Binary] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = self

    def known(self, launch: Launch) -> Binary | None:
        return self.seen.get(launch.options["tile"])

    def submit(self, _: Any, launch: Launch, *__: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(self.binary(launch.options["tile"]))
        return done

    def binary(self, tile: Tile) -> Binary:
        steps = [abs(log2(a) - log2(b)) for a, b in zip(tile[:5], BEST[:5], strict=True)]
        far = int(sum(steps)) + abs(tile.num_stages - BEST.num_stages)
        load = Op("load", (64, 64), 2, "q", ()), Op("store", (64, 64), 2, "out", ())
        again = [Op("load", (64, 64), 2, "k", ())] * 40 * far
        spill = 8 if tile.num_warps == BEST.num_warps and not self.sound else 0
        accesses = (Access(False, True, 16, 1), Access(True, True, 16, 1))
        found = Binary(64, spill, spill // 4, 0, 0, 4, 2, 1, {"HGMMA": 1}, 0, accesses, (), (*load, *again))
        self.seen[tile] = found
        return found


def searched(planted: Planted) -> list[Finding]:
    return search(PlantedTask(H100, PROBLEM, "forward"), planted)


def test_a_search_goes_to_the_best_and_names_its_neighbours() -> None:
    with Terminal().progress("binaries") as bar:
        ranked = searched(Planted(bar=bar))
        assert bar.progress.tasks[0].completed == bar.progress.tasks[0].total == len(ranked)
    assert ranked[0].tile == BEST
    assert len(ranked) == len({finding.tile for finding in ranked})
    assert set(Task(H100, PROBLEM, "forward").neighbours(BEST)) <= {finding.tile for finding in ranked}


def test_an_interrupted_search_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = Planted()
    first = searched(planted)
    monkeypatch.delattr(Planted, "submit")  # nothing can be compiled any more
    assert [f.tile for f in searched(planted)] == [f.tile for f in first]


def test_what_spills_ranks_behind() -> None:
    best = searched(Planted(sound=False))[0]
    assert best.violations == []
    assert best.tile.num_warps != BEST.num_warps
    assert best.tile[:4] == BEST[:4]


# -- the choice --------------------------------------------------------------------------------------------------------


def finding(step: str, us: float, violations: Sequence[str] = (), task: Task | None = None) -> Finding:
    task = task or Task(H100, PROBLEM, step)
    return Finding(task, TILE, None, list(violations), None, measured=us * 1e-6)


@pytest.mark.parametrize(
    ("us", "chosen"),
    [
        ({"group": 5, "queries": 2, "keys": 2}, "queries keys"),
        ({"group": 4, "queries": 2, "keys": 3, "dk": 1, "dv": 1.5}, "group"),
        ({"queries": 2, "keys": 3, "dk": 1, "dv": 1.5}, "queries dk dv"),
        ({"group": 4.4, "queries": 2, "keys": 2, "pairs": 1}, "group"),
        ({"group": 5.5, "queries": 2, "keys": 2, "pairs": 1}, "queries keys pairs"),
        ({"forward": 3}, "forward"),
    ],
)
def test_the_fastest_way_to_do_a_pass_is_chosen(us: dict[str, float], chosen: str) -> None:
    tried = {step: [finding(step, us[step])] if step in us else [] for step in STEPS}
    assert " ".join(f.task.step for f in choose(tried)) == chosen


def test_a_sound_way_is_preferred() -> None:
    tried = {step: [finding(step, us)] for step, us in {"queries": 2, "keys": 3}.items()}
    assert [f.task.step for f in choose(tried | {"group": [finding("group", 1, ["spills"])]})] == ["queries", "keys"]


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("report --target sm_80 --gpu H100", "--gpu H100 has the target sm_90"),
        ("report --tiles BLOCK_M=48", "powers of two"),
        ("report --tiles num_warps=4 --step queries", "--step must be of the forward pass, forward, got 'queries'"),
        ("report --vs shipped", "--step and --vs are for --tiles"),
        ("report --pass backward --widths 64 64 --step dv --tiles num_warps=4", "no tile of dv is shipped"),
        ("report --target gfx942 --execute", "--execute is for NVIDIA's targets, got gfx942"),
        ("bounds --targets gfx1100", "invalid choice"),
        ("bounds --redraw --out nowhere", "there is no nowhere/tile_bounds.csv"),
        ("sweep --widths 20", "invalid choice"),
        ("sweep --tokens 50", "invalid choice"),
        ("report --dtype int8", "must be one of bfloat16, float16, tf32, float32, fp32, fp16, bf16, got 'int8'"),
        ("search --target sm_70", "invalid choice"),
        ("search --problems nowhere.json", "--problems nowhere.json is not a list of problems"),
        ("search --problems nowhere.json --heads 2", "takes no --heads"),
        ("verify --shapes ISA", "invalid choice"),
        ("verify --targets sm_70", "invalid choice"),
        ("search --measure 3", "--measure needs a GPU"),
        ("plot --pass backward --tokens 4096 --step group", "no tile of group is shipped"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: str, named: str, capsys: pytest.CaptureFixture[str], compiling: None
) -> None:
    with pytest.raises(SystemExit):
        main(["tiles", *arguments.split()])
    said = capsys.readouterr().err
    assert named in said.replace("\n", " ")
    assert f"usage: python -m bench tiles {arguments.split()[0]} " in said


def test_problems_by_name_and_by_description_exclude_each_other() -> None:
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    with pytest.raises(argparse.ArgumentError, match="--tokens --heads describes another"):
        verify.run(parser.parse_args(["--shapes", "ISA 64", "--tokens", "64", "--heads", "2"]))


@pytest.mark.parametrize("widths", [(16, 16), (48, 48), (256, 512)])
def test_the_tiles_that_are_drawn_are_all_blocks_that_fit_the_group(widths: tuple[int, int]) -> None:
    drawn = plot.space(Task(H100, make_problem(49, *widths), "forward"))
    assert {tile[:2] for tile in drawn} == {(m, n) for m in (16, 32, 64) for n in (16, 32, 64)}
    assert len({tile[2:] for tile in drawn}) == 1


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"tokens": 64, "key_width": 8, "value_width": 8, "dtype": "int8"}, "got 'int8'"),
        ({"tokens": 64, "key_width": 8, "value_width": 8, "pass": "sideways"}, "'sideways'"),
        ({"tokens": 64, "key_width": 8}, "value_width"),
        ({"tokens": 64, "key_width": 8, "value_width": 8, "partition": "round"}, "'round'"),
    ],
)
def test_what_is_no_problem_is_named(entry: dict[str, object], named: str, tmp_path: Path) -> None:
    (tmp_path / "problems.json").write_text(json.dumps([entry]))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    with pytest.raises(argparse.ArgumentError, match=f"problems.json is not a list of problems: .*{named}"):
        command.run(parser.parse_args(["--problems", str(tmp_path / "problems.json")]))


PLANTED = """
import json, os, shutil, sys
from contextlib import contextmanager
from pathlib import Path
from bench.__main__ import main
from bench.tiles import options, plot, warm
from bench.tiles.assembly import Stretch
from bench.tiles.binaries import Access, Binaries, Binary, dump_file
from bench.tiles.program import Op
from isa_triton import tiles

class Planted(Binaries):
    def known(self, launch):
        if self.dump is not None:
            file = dump_file(self.dump, launch)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("EXIT")
        ops = Op("load", (64, 64), 2, "q", ()), Op("store", (64, 64), 2, "out", ()), Op("dot", (64, 64, 64), 2, "", ())
        matrix = {} if launch.problem.dtype == "float32" and not launch.target.startswith("gfx9") else {"HGMMA": 1}
        stretch = Stretch((), {"matrix": 8, "special": 8}, 4096, 0, 1.0, 0.0)
        return Binary(64, 0, 0, 0, 0, 4, 2, 1, matrix, 0, (Access(True, True, 16, 1),), (), ops, (stretch,))

@contextmanager
def planted(args, said, dump=None):
    with said.progress("binaries") as bar:
        yield Planted(args.cache, None, dump, bar)

options.compilers, warm.compiled = planted, lambda wanted, cache, pool: wanted
os.chdir(sys.argv[1])
tiles.FOLDER = Path(shutil.copytree(tiles.FOLDER, "tiles"))
if "fails" in sys.argv:
    plot.draw_roofline = None
for command in json.loads(sys.argv[2]):
    print("$", *command, flush=True)
    main(command)
"""


def run_planted(folder: Path, commands: list[list[str]], *how: str) -> subprocess.CompletedProcess[str]:
    """Commands one after another, in a folder, where every kernel has the same binary and nothing is compiled."""
    return run_compiling("-c", PLANTED, str(folder), json.dumps(commands), *how)


@pytest.mark.slow
def test_every_command_on_a_page_runs_to_its_last_output(tmp_path: Path) -> None:
    commands = [words for _, words in COMMANDS if words[0] == "tiles"]
    assert {words[1] for words in commands} == set(TOOLS)
    (tmp_path / "bench" / "tiles").mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "tiles" / "textbook.py", tmp_path / "bench" / "tiles")
    done = run_planted(tmp_path, commands)
    assert done.returncode == 0, done.stdout + done.stderr
    _, *said = re.split(r"^\$ ", done.stdout, flags=re.MULTILINE)
    assert len(said) == len(commands)
    last = {"verify": "0 with a violation", "calibrate": "predicted / published", "report": "PREDICTED",
            "search": "PREDICTED: now", "plot": "PREDICTED", "warm": "are in Triton's cache",
            "bounds": "tile_bounds.png", "sweep": "cells searched"}  # fmt: skip
    for words, text in zip(commands, said, strict=True):
        assert last[words[1]] in "\n".join(text.splitlines()[-2:]), text
        for option in {"--html", "--json"} & set(words):
            assert (tmp_path / words[words.index(option) + 1]).stat().st_size
    assert {path.name for path in tmp_path.glob("out/*.png")} == {"roofline-sm_90.png", "tiles-sm_90.png"}


@pytest.mark.slow
def test_a_figure_is_written_as_soon_as_it_is_drawn(tmp_path: Path) -> None:
    done = run_planted(tmp_path, [["tiles", "plot", "--widths", "64", "64"]], "fails")
    assert "TypeError: 'NoneType' object is not callable" in done.stderr
    assert [path.name for path in tmp_path.glob("out/*.png")] == ["tiles-sm_90.png"]


@pytest.mark.slow
def test_a_report_sets_tiles_side_by_side(tmp_path: Path) -> None:
    problem = ["tiles", "report", "--tokens", "100", "--widths", "40", "40"]
    beside = ["--tiles", "BLOCK_M=32", "shipped", "--vs", "shipped", "--sass", "--dump", "dump", "--format", "csv",
              "--json", "two.json"]  # fmt: skip
    done = run_planted(tmp_path, [[*problem, "--json", "one.json"], [*problem, *beside]])
    assert done.returncode == 0, done.stdout + done.stderr
    (one,), (shipped, other) = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == shipped
    assert shipped["tile"] == named(tiles.lookup("sm_90", "forward", 40, 40, "bfloat16", 100, bias=False))
    assert shipped["tile_from"] == "the entry of sm_90, K = 48, V = 48, 100 tokens"
    assert other["tile"] == {**shipped["tile"], "BLOCK_M": 32}
    assert other["tile_from"] == NOT_SHIPPED
    a, b = (1e6 * kernel["predicted_seconds"] for kernel in (shipped, other))
    assert a != b
    assert f"PREDICTED us,{a:.1f},{b:.1f} ({100 * (b / a - 1):+.0f} %)" in done.stdout.splitlines()
    assert done.stderr.splitlines().count("EXIT") == 2  # the machine code of both is beside the table
    assert len(list((tmp_path / "dump" / "sm_90").glob("interlaced-100-*.sass"))) == 2


@pytest.mark.slow
def test_whatever_the_run_time_launches_has_the_tile_of_an_entry(tmp_path: Path) -> None:
    verify_all = ["tiles", "verify", "--targets", "sm_86", "gfx942", "--json", "all.json", "--format", "csv"]
    widths = ["--widths", "64", "64", "--bias", "--pass", "backward"]
    searches = {str(n): ["tiles", "search", *widths, "--tokens", str(n), "--json", f"{n}.json"] for n in (64, 256)}
    done = run_planted(tmp_path, [verify_all, *searches.values()])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "all.json").read_text())
    assert len(rows) > 200
    assert {row["tile_from"].partition(" of ")[0] for row in rows} == {"its own entry", "the entry"}
    shipped = {n: [row["step"] for row in json.loads((tmp_path / f"{n}.json").read_text()) if row["shipped"]]
               for n in searches}  # fmt: skip
    assert shipped == {"64": ["group"], "256": ["columns", "pairs"]}


# -- what a search says ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> Search:
    """A search whose shipped tile is not the best, and in which what has 2 warps spills."""
    ranked = searched(Planted(sound=False))
    shipped = next(finding for finding in ranked if finding.tile == Task(H100, PROBLEM, "forward").shipped()[0])
    return Search(H100, PROBLEM, "forward", {"forward": ranked}, ranked[:1], [shipped])


def test_a_search_says_what_is_gained(found: Search) -> None:
    (best,), (shipped,) = found.chosen, found.shipped
    now, then = 1e6 * shipped.seconds, 1e6 * best.seconds
    assert then < now
    gain = f"{100 * (then / now - 1):+.0f} %"
    kernels = f"forward {format_tile(best.tile)}"
    assert found.result == f"PREDICTED: now {now:.1f} us -> {then:.1f} us, {gain}, with {kernels}"
    assert found.vs_shipped(best) == gain
    assert found.vs_shipped(shipped) == "+0 %"
    rows = list(found.as_dicts())
    assert [row["tile"] for row in rows if row["chosen"]] == [named(best.tile)]
    assert [row["tile"] for row in rows if row["shipped"]] == [named(shipped.tile)]


class Page(HTMLParser):
    """What a page holds: the rows of its tables, and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, tuple[str, list[str]]] = {}  # by id: its class and cells
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.links += [given[name] for name in ("src", "href", "xlink:href") if name in given]
        if tag == "tr" and "id" in given:
            self.rows[given["id"]] = given["class"], []

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] == ["td"] and data.strip():
            list(self.rows.values())[-1][1].append(data)


def test_the_page_of_a_search_holds_every_tile_as_a_row_and_a_point(found: Search) -> None:
    text, tried = page.html([found, found]), found.tried["forward"]
    shown = Page(text)
    assert len(shown.rows) == 2 * len(tried)
    for finding, (kinds, cells) in zip(tried + tried, shown.rows.values(), strict=True):
        assert cells[:7] == [*map(str, finding.tile), f"{1e6 * finding.seconds:.1f}"]
        holds = finding in found.chosen, found.is_shipped(finding), bool(finding.violations)
        named_ = [kind for kind, held in zip(("chosen", "shipped", "violating"), holds, strict=True) if held]
        assert kinds.split() == named_
    points = [link for link in shown.links if link.startswith("#search")]
    assert sorted(points) == sorted(f"#{name}" for name in shown.rows)
    assert found.result.replace(">", "&gt;") in text


def test_the_page_needs_nothing_beside_itself(found: Search) -> None:
    text = page.html([found])
    shown = Page(text)
    assert all(link.startswith("#") for link in shown.links)
    assert not {"link", "img", "iframe", "object"} & set(shown.tags)
    assert "@import" not in text
    assert "url(http" not in text


def test_a_pass_cannot_do_less_than_its_inputs_and_outputs() -> None:
    problem = make_problem(64, 256, 512, "local", maps=2)
    forward, backward = (Pass(problem, pass_, H100, []) for pass_ in ("forward", "backward"))
    pixels = 2 * 64 * 64
    assert forward.bytes == pixels * 2 * (256 + 256 + 512 + 512)
    assert backward.bytes == pixels * 2 * (2 * 256 + 2 * 512 + 2 * 256 + 512)
    assert forward.flops == pixels * 64 * 2 * (256 + 512)
    assert backward.flops == pixels * 64 * 2 * (3 * 256 + 2 * 512)


TWICE = """
import shutil, sys
from pathlib import Path
from bench.__main__ import main

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    search = "tiles search --tokens 16 --widths 16 16 --target gfx942 --jobs 1".split() + ["--cache", str(folder)]
    main([*search, "--json", str(folder / "first.json")])
    shutil.rmtree(folder / "triton")
    main([*search, "--json", str(folder / "second.json")])
"""


@pytest.mark.slow
def test_a_search_runs_here_and_compiles_nothing_the_second_time(tmp_path: Path) -> None:
    script = tmp_path / "twice.py"
    script.write_text(TWICE)
    done = run_compiling(str(script), str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PREDICTED") == 2
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("first.json", "second.json"))
    assert first == second
    ranks = [(bool(row["violations"]), row["predicted_seconds"]) for row in first]
    assert len(ranks) > 3
    assert ranks == sorted(ranks)
    assert not (tmp_path / "triton").exists()
