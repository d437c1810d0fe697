"""Search tiles for every width and window of the field: `tiles search` over the grid (bench/tiles/grid.py).

A class of cells has one tile a kernel: the one that is sound in most of its cells, and of such the one whose predicted
times are least in their geometric mean. An entry is written as soon as its class is done, and only where it gains
something over the tile that serves the class without it. What was compiled is remembered: interrupted, or with more
widths or targets, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp, inf, log
from statistics import mean

from bench.arguments import positive
from bench.terminal import Terminal
from bench.tiles import grid, options, search
from bench.tiles.binaries import Binaries
from bench.tiles.compile import (
    FILED,
    PASSES,
    Launch,
    Problem,
    format_tile,
    forward_launches,
    pass_launches,
    shipped_entry,
)
from bench.tiles.grid import Class
from bench.tiles.report import Pass
from bench.tiles.roofline import Machine
from bench.tiles.search import PLANS, Finding, Task, findings
from isa_triton import tiles
from isa_triton.tiles import ARITHMETIC, Tile

TOP = 4  # tiles of the leading cell that are tried on all
SEEDS = 4  # tiles of other entries that a search starts from
STARTS = {  # of a step, as (queries, keys, channels, warps, stages): what was found good for one width or another
    "forward": ((128, 64, 128, 4, 2), (64, 64, 128, 4, 2), (128, 128, 128, 8, 2), (64, 128, 128, 4, 3),
                (16, 16, 128, 1, 2), (32, 32, 128, 2, 2), (64, 64, 32, 4, 3), (64, 64, 16, 2, 4)),
    "group": ((16, 16, 128, 1, 2), (32, 32, 128, 2, 2), (64, 64, 128, 4, 2), (64, 64, 32, 4, 2), (64, 64, 16, 4, 4),
              (64, 64, 32, 8, 2)),
    "columns": ((256, 32, 128, 8, 2), (256, 64, 128, 8, 2), (256, 64, 128, 16, 2), (256, 32, 128, 8, 1)),
    "queries": ((128, 64, 128, 4, 2), (64, 64, 128, 4, 2), (128, 64, 128, 8, 2), (64, 32, 128, 4, 2)),
    "keys": ((64, 128, 128, 8, 2), (64, 64, 128, 4, 2), (32, 128, 128, 4, 2), (32, 64, 128, 4, 2)),
    "dk": ((64, 128, 128, 8, 2), (64, 64, 128, 4, 2)),
    "dv": ((64, 128, 128, 8, 2), (64, 64, 128, 4, 2)),
    "pairs": ((64, 64, 128, 4, 2), (128, 64, 128, 8, 2), (64, 128, 128, 4, 2), (64, 32, 128, 4, 2)),
}  # fmt: skip
WORTH = 0.03  # of a class's time, without which no entry is written
COLUMNS, NARROW = 256, 64  # tokens and channels, up to which dq, dk and dv may come from one kernel
ONE_KERNEL = 64  # tokens, up to which one kernel forms every gradient
WIDE = 128  # channels, beyond which dk and dv may go apart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, targets, widths = parser.add_argument, grid.TARGETS, [str(width) for width, _ in grid.WIDTHS]
    add("--targets", nargs="+", choices=targets, default=["sm_90"], metavar="TARGET",
        help=f"of {' '.join(targets)} (default: sm_90)")  # fmt: skip
    add("--dtypes", nargs="+", type=options.read_dtype, default=["bfloat16"], metavar="DTYPE", help="default: bf16")
    add("--widths", nargs="+", type=positive, choices=grid.FIRST, default=list(grid.FIRST), metavar="K",
        help=f"of keys, of {' '.join(widths)} (default: all)")  # fmt: skip
    add("--tokens", nargs="+", type=positive, choices=grid.TOKENS, default=list(grid.TOKENS), metavar="N",
        help=f"of a group, of {' '.join(map(str, grid.TOKENS))} (default: all)")  # fmt: skip
    add(
        "--known", action="store_true", help="try the tiles of all files only, not their neighbours: minutes, not hours"
    )
    add("--minutes", type=positive, metavar="N", help="begin no further class after so long (default: to the end)")
    add("--write", action="store_true", help="put the choices and their evidence into isa_triton/tiles/TARGET.json")
    options.add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    said, end = Terminal(args), inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    wanted = [
        (options.first_machine(target), cells)
        for target in args.targets for dtype in args.dtypes
        for cells in grid.classes(dtype, args.widths, args.tokens)
    ]  # fmt: skip
    done = gained = 0
    with options.compilers(args, said) as binaries:
        for gpu, cells in wanted:
            if time.monotonic() > end:
                break
            found = sweep(gpu, cells, binaries, args.known)
            done, gained = done + 1, gained + found.is_better
            said.say(found.result)
            if args.write and found.is_better:
                search.write(found.news, without_bias=not found.cells.problems[0].bias)
    said.end(f"PREDICTED: {done} of {len(wanted)} classes searched, {gained} of them with better tiles")


@dataclass(frozen=True)
class ClassTask(Task):
    """A kernel of one cell; its search starts from few tiles."""

    known: bool = False

    def shipped(self) -> list[Tile]:
        """What serves the cell now, tiles of every file for the same step and the nearest problems, and `STARTS`."""
        step, problem = FILED.get(self.step, self.step), self.problem
        others = {
            (*(self.far(name, entry[name]) for name in ("key_width", "value_width", "tokens")), target, entry["tile"])
            for target, entry in (
                (target, {**entry, "tile": tuple(entry["tile"])})
                for target in grid.TARGETS for entry in tiles._entries(target)
                if entry["tile"] is not None and entry["step"] == step
            )
            if ARITHMETIC.get(entry["arithmetic"], entry["arithmetic"]) == ARITHMETIC[problem.dtype]
        }  # fmt: skip
        own = [] if self.entry is None else [self.entry.tile, self.clipped(self.entry.tile)]
        near = dict.fromkeys(self.clipped(Tile(*tile)) for *_, tile in sorted(others, key=lambda other: other[:3]))
        planned = (Tile(m, n, width, width, warps, stages) for m, n, width, warps, stages in STARTS[self.step])
        starts = filter(self.may_fit, map(self.clipped, planned))
        return list(dict.fromkeys([*own, *list(filter(self.may_fit, near))[:SEEDS], *starts]))

    def far(self, name: str, limit: int | None) -> float:
        """How far an entry's limit is from the problem, in octaves."""
        mine = self.problem.partition.tokens if name == "tokens" else getattr(self.problem, name)
        return 9.0 if limit is None else abs(log(limit / mine, 2))

    def neighbours(self, tile: Tile) -> Iterator[Tile]:
        return iter(()) if self.known else super().neighbours(tile)


@dataclass(frozen=True)
class Score:
    """How good kernels are for a class: the less, the better. Those that are sound in more of its cells go first."""

    unsound: int  # cells with a violation
    ratio: float  # predicted / bound, the geometric mean over the cells

    @property
    def rank(self) -> tuple[int, float]:
        return self.unsound, self.ratio

    def __str__(self) -> str:
        return f"{self.ratio:.2f}{f' ({self.unsound} cells not sound)' * bool(self.unsound)}"


@dataclass(frozen=True)
class Choice:
    """What was found for a class."""

    gpu: Machine
    cells: Class
    now: Score
    then: Score
    plan: tuple[Finding, ...]  # the kernels of the leading cell, with the tiles that all cells have

    @property
    def is_better(self) -> bool:
        return self.then.rank < (self.now.unsound, (1 - WORTH) * self.now.ratio)

    @property
    def news(self) -> list[Finding]:
        """The kernels whose tile is another than the one that serves now; all of them, where one kernel serves now."""
        lead, before = self.plan[0], ("group", "columns")
        if any(shipped_entry(self.gpu.target, step, lead.task.problem) for step in before if step != lead.task.step):
            return list(self.plan)
        return [f for f in self.plan if any(_tile_now(f, problem) != f.tile for problem in self.cells.problems)]

    @property
    def result(self) -> str:
        lead = self.cells.problems[0]
        kernels = ", ".join(f"{finding.task.step} {format_tile(finding.tile)}" for finding in self.plan)
        return (
            f"{self.gpu.target}, {lead.dtype}, {self.cells.pass_}, K = {lead.key_width}, V = {lead.value_width}, up to "
            f"{self.cells.tokens or 'any'} tokens{', bias' * lead.bias}: PREDICTED / bound {self.now} -> {self.then}, "
            f"{kernels}"
        )


def _tile_now(finding: Finding, problem: Problem) -> Tile | None:
    entry = shipped_entry(finding.task.gpu.target, finding.task.step, problem)
    return None if entry is None else entry.tile


Found = dict[Problem, Finding]  # of one tile, or of one kernel of a plan


def sweep(gpu: Machine, cells: Class, binaries: Binaries, known: bool = False) -> Choice:
    """The best tiles of a class."""
    best = dict[str, Found]()
    for step in _steps(cells):
        found = _best(gpu, step, cells.problems, binaries, known)
        if found is not None:
            best[step] = found
        if step == "group" and found is not None and not _unsound([found]):
            break  # one kernel reads every tensor once, where several would read them again
    needs = {"pairs"} & {*_steps(cells)}  # where there is a bias
    plans = [[best[step] for step in plan if step in best] for plan in PLANS
             if {*plan} - {"pairs"} <= {*best} and ({*plan} & needs <= {*best})]  # fmt: skip
    now = _score(cells, gpu, _now(gpu, cells, binaries))
    if not plans:  # no tile is sound in fp16 and bf16
        return Choice(gpu, cells, now, now, ())
    score, chosen = min(((_score(cells, gpu, plan), plan) for plan in plans), key=lambda each: each[0].rank)
    return Choice(gpu, cells, now, score, tuple(found[cells.problems[0]] for found in chosen))


def _steps(cells: Class) -> Iterator[str]:
    tokens, width = cells.problems[0].partition.tokens, cells.problems[0].key_width
    serves = {
        "group": tokens <= ONE_KERNEL,
        "columns": ONE_KERNEL < tokens <= COLUMNS and width <= NARROW,
        "pairs": cells.problems[0].bias,
        "dk": width > WIDE,
        "dv": width > WIDE,
    }
    return (step for step in PASSES[cells.pass_] if serves.get(step, True))


def _best(gpu: Machine, step: str, problems: Sequence[Problem], binaries: Binaries, known: bool) -> Found | None:
    """The findings of the best tile, for every problem; the first problem is searched, its best tiles tried on all."""
    tasks = {problem: ClassTask(gpu, problem, step, known) for problem in problems}
    searched = search.search(tasks[problems[0]], binaries)
    chosen = dict.fromkeys(finding.tile for finding in searched[:TOP])
    if (now := tasks[problems[0]].entry) is not None:
        chosen[now.tile] = None
    by_tile = dict[Tile, Found]()
    for problem, task in tasks.items():
        for finding in findings(task, chosen, binaries):
            if finding.prediction is not None:
                by_tile.setdefault(finding.tile, {})[problem] = finding
    ranked = sorted(
        (found for found in by_tile.values() if len(found) == len(problems)),
        key=lambda found: (_unsound([found]), mean(log(finding.seconds) for finding in found.values())),
    )
    return next((found for found in ranked if _is_sound_otherwise(gpu, step, found, binaries)), None)


def _is_sound_otherwise(gpu: Machine, step: str, found: Found, binaries: Binaries) -> bool:
    """Whether the tile is sound for fp16 too, which shares bf16's, and where a forward pass writes lse."""
    sound = {problem.partition.tokens % 16: f for problem, f in found.items() if not f.violations}
    launches = list[Launch]()
    for finding in sound.values():
        problem = finding.task.problem
        if problem.dtype == "bfloat16":
            half = ClassTask(gpu, replace(problem, dtype="float16"), step).launch(finding.tile)
            launches += [] if half is None else [half]
        if step == "forward":
            launches += forward_launches(gpu.target, problem, finding.tile, with_lse=True)
    return not any(verdict.violations for verdict in binaries.verdicts(launches))


def _now(gpu: Machine, cells: Class, binaries: Binaries) -> list[Found]:
    """What the run time would launch, kernel by kernel."""
    kernels = dict[str, Found]()
    for problem in cells.problems:
        for launch in pass_launches(gpu.target, problem, cells.pass_):
            (finding,) = findings(Task(gpu, problem, launch.step), [launch.tile], binaries)
            kernels.setdefault(launch.step, {})[problem] = finding
    return list(kernels.values())


def _score(cells: Class, gpu: Machine, plan: Sequence[Found]) -> Score:
    """Of all kernels of a pass together."""
    ratios = []
    for problem in cells.problems:
        bound = max(Pass(problem, cells.pass_, gpu, []).roofs.values())
        ratios.append(sum(found[problem].seconds for found in plan if problem in found) / bound)
    return Score(_unsound(plan), exp(mean(map(log, ratios))))


def _unsound(plan: Sequence[Found]) -> int:
    """In how many cells some kernel has a violation."""
    return len({problem for found in plan for problem, finding in found.items() if finding.violations})
