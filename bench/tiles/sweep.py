"""Search tiles for every width and window of the field: `tiles search` over the grid (bench/tiles/grid.py).

A class of cells has one tile a kernel: the one whose predicted times are least in the geometric mean over its cells,
among those that are sound in all of them. An entry is written as soon as its class is done, and only where it gains
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
from bench.tiles.compile import FILED, PASSES, Problem, format_tile, forward_launches, pass_launches, shipped_entry
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
    "queries": ((128, 64, 128, 4, 2), (64, 64, 128, 4, 2), (128, 64, 128, 8, 2), (64, 32, 128, 4, 2)),
    "keys": ((64, 128, 128, 8, 2), (64, 64, 128, 4, 2), (32, 128, 128, 4, 2), (32, 64, 128, 4, 2)),
    "dk": ((64, 128, 128, 8, 2), (64, 64, 128, 4, 2)),
    "dv": ((64, 128, 128, 8, 2), (64, 64, 128, 4, 2)),
    "pairs": ((64, 64, 128, 4, 2), (128, 64, 128, 8, 2), (64, 128, 128, 4, 2), (64, 32, 128, 4, 2)),
}  # fmt: skip
WORTH = 0.03  # of a class's time, without which no entry is written
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
                search.write(found.news)
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
class Choice:
    """What was found for a class."""

    gpu: Machine
    cells: Class
    now: float  # predicted / bound, the geometric mean over the cells; infinite where a kernel is not sound
    then: float
    plan: tuple[Finding, ...]  # the kernels of the leading cell, with the tiles that all cells have

    @property
    def is_better(self) -> bool:
        return self.then < (1 - WORTH) * self.now

    @property
    def news(self) -> list[Finding]:
        """The kernels whose tile is another than the one that serves now; all of them, where one kernel serves now."""
        lead = self.plan[0]
        if lead.task.step == "queries" and shipped_entry(self.gpu.target, "group", lead.task.problem) is not None:
            return list(self.plan)
        return [
            finding for finding in self.plan if any(_tile_now(finding, p) != finding.tile for p in self.cells.problems)
        ]

    @property
    def result(self) -> str:
        lead = self.cells.problems[0]
        kernels = ", ".join(f"{finding.task.step} {format_tile(finding.tile)}" for finding in self.plan)
        return (
            f"{self.gpu.target}, {lead.dtype}, {self.cells.pass_}, K = {lead.key_width}, V = {lead.value_width}, up to "
            f"{self.cells.tokens or 'any'} tokens: PREDICTED / bound {self.now:.2f} -> {self.then:.2f}, {kernels}"
        )


def _tile_now(finding: Finding, problem: Problem) -> Tile | None:
    entry = shipped_entry(finding.task.gpu.target, finding.task.step, problem)
    return None if entry is None else entry.tile


def sweep(gpu: Machine, cells: Class, binaries: Binaries, known: bool = False) -> Choice:
    """The best tiles of a class."""
    bounds = {problem: max(Pass(problem, cells.pass_, gpu, []).roofs.values()) for problem in cells.problems}
    tried = dict[str, dict[Tile, dict[Problem, Finding]]]()
    for step in _steps(cells):
        problems = [problem for problem in cells.problems if problem.bias or step != "pairs"]
        tried[step] = _try(gpu, step, problems, binaries, known)
        if step == "group" and tried[step]:
            break  # one kernel reads every tensor once, where several would read them again
    best = {step: min(found.values(), key=_mean_seconds) for step, found in tried.items() if found}
    plans = [
        {step: best[step] for step in plan if step in best} for plan in PLANS if {*plan} - {"pairs"} <= {*best}
    ]  # fmt: skip
    now = _mean_ratio(bounds, _now(gpu, cells, binaries))
    if not plans:
        return Choice(gpu, cells, now, inf, ())
    totals = [{problem: _total(plan, problem) for problem in cells.problems} for plan in plans]
    then, plan = min(
        zip((_mean_ratio(bounds, total) for total in totals), plans, strict=True), key=lambda each: each[0]
    )
    lead = cells.problems[0]
    return Choice(gpu, cells, now, then, tuple(by_problem[lead] for by_problem in plan.values()))


def _steps(cells: Class) -> Iterator[str]:
    tokens, width = cells.problems[0].partition.tokens, cells.problems[0].key_width
    for step in PASSES[cells.pass_]:
        if tokens <= ONE_KERNEL if step == "group" else width > WIDE or step not in ("dk", "dv"):
            yield step


def _try(
    gpu: Machine, step: str, problems: Sequence[Problem], binaries: Binaries, known: bool
) -> dict[Tile, dict[Problem, Finding]]:
    """The best tile of those that are sound for every problem, and its findings; the leading problems are searched."""
    of_bias = {problem.bias: problem for problem in reversed(problems)}  # which has kernels of its own in these steps
    leads = list(of_bias.values()) if step in ("forward", "group") else problems[:1]
    tasks = {problem: ClassTask(gpu, problem, step, known) for problem in problems}
    chosen = list[Tile]()
    for lead in leads:
        sound = [finding.tile for finding in search.search(tasks[lead], binaries) if not finding.violations]
        chosen += sound[:TOP]
        if (now := tasks[lead].entry) is not None and now.tile in sound:
            chosen.append(now.tile)
    found = dict[Tile, dict[Problem, Finding]]()
    for problem, task in tasks.items():
        for finding in findings(task, dict.fromkeys(chosen), binaries):
            if not finding.violations and finding.prediction is not None:
                found.setdefault(finding.tile, {})[problem] = finding
    everywhere = {tile: by_problem for tile, by_problem in found.items() if len(by_problem) == len(problems)}
    ranked = sorted(everywhere, key=lambda tile: _mean_seconds(everywhere[tile]))
    sound_too = next((tile for tile in ranked if _is_sound_otherwise(gpu, step, problems, tile, binaries)), None)
    return {} if sound_too is None else {sound_too: everywhere[sound_too]}


def _is_sound_otherwise(gpu: Machine, step: str, problems: Sequence[Problem], tile: Tile, binaries: Binaries) -> bool:
    """Whether the tile is sound for fp16, which shares bf16's, and where a forward pass writes lse."""
    leads = list({(problem.bias, problem.partition.tokens % 16): problem for problem in problems}.values())
    halves = [replace(problem, dtype="float16") for problem in leads if problem.dtype == "bfloat16"]
    launches = [launch for p in halves if (launch := ClassTask(gpu, p, step).launch(tile)) is not None]
    if step == "forward":
        launches += [launch for p in leads for launch in forward_launches(gpu.target, p, tile, with_lse=True)]
    return not any(verdict.violations for verdict in binaries.verdicts(launches))


def _mean_seconds(found: dict[Problem, Finding]) -> float:
    return mean(log(finding.seconds) for finding in found.values())


def _total(plan: dict[str, dict[Problem, Finding]], problem: Problem) -> float:
    return sum(found[problem].seconds for found in plan.values() if problem in found)


def _now(gpu: Machine, cells: Class, binaries: Binaries) -> dict[Problem, float]:
    """Seconds of what the run time would launch; infinite where that is not sound."""
    seconds = dict[Problem, float]()
    for problem in cells.problems:
        launches = pass_launches(gpu.target, problem, cells.pass_)
        found = [f for each in launches for f in findings(Task(gpu, problem, each.step), [each.tile], binaries)]
        seconds[problem] = inf if any(f.violations for f in found) else sum(f.seconds for f in found)
    return seconds


def _mean_ratio(bounds: dict[Problem, float], seconds: dict[Problem, float]) -> float:
    return exp(mean(log(seconds[problem] / bound) for problem, bound in bounds.items()))
