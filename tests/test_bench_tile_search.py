"""The search for tiles: its steps, its choice, what it writes, and a search that is small enough to run here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from math import log2
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.tiles import plot
from bench.tiles.binaries import Access, Binaries, Binary
from bench.tiles.compile import Launch
from bench.tiles.options import make_problem
from bench.tiles.program import Op
from bench.tiles.report import BOUNDS, Pass
from bench.tiles.roofline import MACHINES
from bench.tiles.search import KERNELS, Finding, Task, choose, search, write
from isa_triton import tiles
from isa_triton.backend.kernels import launch
from isa_triton.tiles import Tile
from tests.compiling import run_compiling

H100, PROBLEM = MACHINES["H100"], make_problem(64, 64, 64)
TILE = Tile(64, 64, 32, 32, 4, 2)

# -- steps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", list(KERNELS))
@pytest.mark.parametrize("gpu", ["A100", "B200", "MI300X"])
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
        return PlantedLaunch(*kernel, "sm_90", self.problem, {}, {}, {}, {"tile": tile}, (132,))


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
    advanced: list[None] = []
    ranked = searched(Planted(advance=lambda: advanced.append(None)))
    assert ranked[0].tile == BEST
    assert len(advanced) == len(ranked) == len({finding.tile for finding in ranked})
    assert set(Task(H100, PROBLEM, "forward").neighbours(BEST)) <= {finding.tile for finding in ranked}


def test_an_interrupted_search_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = Planted()
    first = searched(planted)
    monkeypatch.delattr(Planted, "submit")  # nothing can be compiled any more
    assert [f.tile for f in searched(planted)] == [f.tile for f in first]


def test_what_spills_ranks_behind() -> None:
    best = searched(Planted(sound=False))[0]
    assert best.offences == []
    assert best.tile.num_warps != BEST.num_warps
    assert best.tile[:4] == BEST[:4]


TIMED = """
import torch
from unittest.mock import patch
from triton.runtime.jit import JITFunction
from bench import measure
from bench.tiles import search
from bench.tiles.options import make_problem
from bench.tiles.roofline import MACHINES
from isa_triton.tiles import Tile

def run(kernel, *args, grid, warmup, **kwargs):
    if not warmup:
        given = dict(zip(kernel.arg_names, args))
        written = [name for name in ("dk", "dv") if given.get(name) is not None]
        launched.append(" ".join([kernel.fn.__name__, *written]))

def seconds(calls, **options):
    launched.clear()
    for call in calls.values():
        call()
    return dict.fromkeys(calls, 1.0)

randn, recorded = torch.randn, JITFunction.run
measure.seconds, search.use_driver = seconds, lambda: setattr(JITFunction, "run", run)  # as a GPU's, from here on
torch.randn = lambda shape, device, dtype: randn(shape, dtype=dtype)
for step in search.KERNELS:
    for tokens in (16, 64):
        launched, JITFunction.run = [], recorded
        problem = make_problem(tokens, 16, 16, bias=True, maps=1)
        task, tile = search.Task(MACHINES["H100"], problem, step), Tile(64 if step == "group" else 32, 32, 16, 16)
        if task.launch(tile) is not None:
            assert task.seconds(tile) == 1.0
            print(step, tokens, *launched)
"""


@pytest.mark.slow
def test_only_the_kernel_of_a_step_is_timed() -> None:
    done = run_compiling("-c", TIMED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "forward 16 forward_group_kernel",
        "forward 64 forward_kernel",
        "group 16 backward_group_kernel dk dv",
        "group 64 backward_group_kernel dk dv",
        *(f"queries {tokens} backward_queries_kernel" for tokens in (16, 64)),
        *(f"keys {tokens} backward_keys_kernel dk dv" for tokens in (16, 64)),
        *(f"dk {tokens} backward_keys_kernel dk" for tokens in (16, 64)),
        *(f"dv {tokens} backward_keys_kernel dv" for tokens in (16, 64)),
        *(f"pairs {tokens} backward_pairs_kernel" for tokens in (16, 64)),
    ]


# -- the choice --------------------------------------------------------------------------------------------------------


def finding(step: str, us: float, offences: Sequence[str] = (), task: Task | None = None) -> Finding:
    task = task or Task(H100, PROBLEM, step)
    return Finding(task, TILE, None, list(offences), None, measured=us * 1e-6)


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
    tried = {step: [finding(step, us[step])] if step in us else [] for step in KERNELS}
    assert " ".join(f.task.step for f in choose(tried)) == chosen


def test_a_sound_way_is_preferred() -> None:
    tried = {step: [finding(step, us)] for step, us in {"queries": 2, "keys": 3}.items()}
    assert [f.task.step for f in choose(tried | {"group": [finding("group", 1, ["spills"])]})] == ["queries", "keys"]


# -- the files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped files, which may be written to."""
    shutil.copytree(tiles.FOLDER, tmp_path / "tiles")
    monkeypatch.setattr(tiles, "FOLDER", tmp_path / "tiles")
    for cached in (tiles._lookup, tiles._entries):
        cached.cache_clear()
    return tmp_path / "tiles"


def test_what_is_written_is_found(folder: Path) -> None:
    before = json.loads((folder / "sm_90.json").read_text())
    tile = Tile(64, 64, 16, 16, 2, 5)
    problem = make_problem(49, 80, 96)
    chosen = [
        Finding(Task(H100, problem, step), tile, None, [], None, measured=1e-5) for step in ("queries", "keys", "pairs")
    ]
    assert write(chosen) == folder / "sm_90.json"
    after = json.loads((folder / "sm_90.json").read_text())
    assert len(after) == len(before) + 4  # dv, which comes with dk, has a line too
    assert all(entry in after for entry in before)
    for step in ("queries", "keys", "pairs"):
        assert tiles.lookup("sm_90", step, 80, 96, "float16", 50) == tile
    with pytest.raises(LookupError):
        tiles.lookup("sm_90", "values", 80, 96, "float16", 50)
    assert {entry["evidence"]["how"] for entry in after if entry["tile"] == list(tile)} == {"measured"}
    write(chosen)
    assert json.loads((folder / "sm_90.json").read_text()) == after


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16", "float32"])
def test_what_is_written_goes_before_what_the_dtype_had_to_itself(dtype: str, folder: Path) -> None:
    problem = make_problem(64, 80, 96, dtype=dtype)
    own = {"step": "forward", "arithmetic": dtype, "key_width": 80, "value_width": 96, "tokens": 64, "tile": [*TILE]}
    (folder / "sm_90.json").write_text(json.dumps([*json.loads((folder / "sm_90.json").read_text()), own]))
    assert tiles.lookup("sm_90", "forward", *problem.sizes) == TILE
    found = replace(finding("forward", 1, task=Task(H100, problem, "forward")), tile=TILE._replace(num_stages=5))
    write([found])
    assert tiles.lookup("sm_90", "forward", *problem.sizes) == found.tile


# -- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("report --target sm_80 --gpu H100", "--gpu H100 has the target sm_90"),
        ("report --tile 64 64 48 64 4 2", "powers of two"),
        ("report --tile 64 64 64 64 4 2 --step queries", "--step must be of the forward pass"),
        ("report --csv bounds.csv", "--csv is for --bounds"),
        ("report --dtype int8", "invalid choice"),
        ("search --target sm_70", "invalid choice"),
        ("search --shapes nowhere.json", "--shapes nowhere.json is not a list of problems"),
        ("search --measure 3", "--measure needs a GPU"),
        ("plot --pass backward --tokens 4096 --step group", "no tile of group is shipped"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: str, named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit):
        main(["tiles", *arguments.split()])
    assert named in capsys.readouterr().err.replace("\n", " ")


def test_the_promised_bounds_are_looked_at() -> None:
    seen = {(p.partition.tokens, p.key_width, p.value_width, pass_): bound for p, pass_, bound in BOUNDS}
    assert seen == {
        (64, 256, 512, "forward"): 1.3, (256, 256, 512, "forward"): 1.3,
        (64, 256, 512, "backward"): 2.0, (256, 256, 512, "backward"): 2.0,
        (49, 32, 32, "forward"): 2.0, (64, 32, 32, "forward"): 2.0,
        (49, 32, 32, "backward"): 3.0, (64, 32, 32, "backward"): 3.0,
    }  # fmt: skip


def test_every_kernel_has_a_marker_in_the_plot() -> None:
    kernels = [name for name, kernel in vars(launch).items() if hasattr(kernel, "arg_names")]
    assert len(kernels) > 4
    assert {name.split("_")[-2] for name in kernels} == set(plot.MARKERS)


PLOT = """
import sys
from contextlib import contextmanager
from pathlib import Path
from bench.__main__ import main
from bench.tiles import options, plot
from bench.tiles.binaries import Binaries
from bench.tiles.program import Op
from bench.tiles.binaries import Access, Binary

class Planted(Binaries):
    def known(self, launch):
        ops = Op("load", (64, 64), 2, "q", ()), Op("store", (64, 64), 2, "out", ()), Op("dot", (64, 64, 64), 2, "", ())
        return Binary(64, 0, 0, 0, 0, 4, 2, 1, {}, 0, (Access(True, True, 16, 1),), (), ops)

@contextmanager
def planted(args, dump=None):
    yield Planted(args.cache, None)

options.compilers = planted
options_of_plot = ["tiles", "plot", "--target", "sm_90", "--widths", "64", "64", "--cache", sys.argv[1], "--out"]
main([*options_of_plot, sys.argv[1] + "/both"])
plot.draw_roofline = None
try:
    main([*options_of_plot, sys.argv[1] + "/one"])
except TypeError:
    pass
print(*sorted(str(path.relative_to(sys.argv[1])) for path in Path(sys.argv[1]).rglob("*.png")))
"""


@pytest.mark.slow
def test_both_figures_are_written_each_as_soon_as_it_is_drawn(tmp_path: Path) -> None:
    done = run_compiling("-c", PLOT, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "both/roofline-sm_90.png both/tiles-sm_90.png one/tiles-sm_90.png"


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
    ranks = [(bool(row["offences"]), row["predicted_seconds"]) for row in first]
    assert len(ranks) > 3
    assert ranks == sorted(ranks)
    assert not (tmp_path / "triton").exists()
