"""Search tiles for every width and window of the field: `tiles search` over the grid (bench/tiles/grid.py).

An entry is written as soon as its cell is searched, and only where it gains something over the tile that serves the
cell without it. What was compiled is remembered: interrupted, or with more widths or targets, the same command goes on
where it was.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf, log

from bench.arguments import positive
from bench.terminal import Terminal
from bench.tiles import grid, options, search
from bench.tiles.binaries import Binaries
from bench.tiles.compile import (
    FILED,
    PASSES,
    Launch,
    Problem,
    forward_launches,
    pass_launches,
    shipped_entry,
)
from bench.tiles.roofline import Machine
from bench.tiles.search import Finding, Search, Task, findings
from isa_triton import tiles
from isa_triton.tiles import ARITHMETIC, Tile

TOP = 4  # tiles of a kernel, of which the first that is sound in fp16 as well is taken
SEEDS = 4  # tiles of other entries that a search starts from
STARTS = {  # of a step, as (queries, keys, channels, warps, stages): what was found good for one width or another
    "forward": ((64, 64, 128, 4, 2), (64, 64, 128, 2, 3), (128, 64, 128, 4, 3), (128, 64, 128, 4, 2),
                (64, 64, 128, 4, 3), (64, 32, 128, 4, 3), (64, 128, 128, 4, 3),
                (16, 16, 128, 1, 2), (32, 32, 128, 2, 2), (64, 64, 32, 4, 3), (64, 64, 16, 2, 4)),
    "group": ((16, 16, 128, 1, 3), (32, 32, 128, 2, 3), (64, 64, 128, 4, 1), (64, 64, 128, 4, 2), (64, 64, 128, 4, 3),
              (64, 64, 32, 4, 2), (64, 64, 16, 4, 4)),
    "columns": ((256, 64, 128, 8, 3), (256, 64, 128, 8, 1), (128, 64, 128, 4, 3), (128, 32, 128, 4, 2)),
    "queries": ((64, 64, 128, 4, 3), (128, 64, 128, 4, 3), (128, 64, 128, 8, 2), (64, 32, 128, 4, 3)),
    "keys": ((64, 128, 128, 8, 2), (64, 64, 128, 4, 2), (32, 128, 128, 4, 2), (128, 64, 128, 8, 2)),
    "dk": ((64, 128, 128, 8, 2), (64, 64, 128, 4, 2)),
    "dv": ((64, 128, 128, 8, 2), (64, 64, 128, 4, 2)),
    "pairs": ((128, 64, 128, 8, 3), (128, 64, 64, 8, 3), (64, 64, 128, 4, 3), (64, 64, 128, 4, 2), (64, 128, 128, 8, 2),
              (128, 64, 128, 8, 1)),
}  # fmt: skip
WORTH = 0.03  # of a cell's time, without which no entry is written
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
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="default: both")
    add(
        "--known", action="store_true", help="try the tiles of all files only, not their neighbours: minutes, not hours"
    )
    add("--minutes", type=positive, metavar="N", help="begin no further cell after so long (default: to the end)")
    add("--write", action="store_true", help="put the choices and their evidence into isa_triton/tiles/TARGET.json")
    options.add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    said, end = Terminal(args), inf if args.minutes is None else time.monotonic() + 60 * args.minutes
    wanted = [
        (options.first_machine(target), *cell)
        for target in args.targets for dtype in args.dtypes
        for cell in grid.in_turn(dtype, args.widths, args.tokens, args.passes)
    ]  # fmt: skip
    done = gained = 0
    with options.compilers(args, said) as binaries:
        for gpu, problem, pass_ in wanted:
            if time.monotonic() > end:
                break
            found = sweep(gpu, problem, pass_, binaries, args.known)
            news = worth_writing(found)
            done, gained = done + 1, gained + bool(news)
            said.say(f"{found.title}: {found.result}")
            if args.write and news:
                search.write(news, without_bias=not problem.bias)
    said.end(f"PREDICTED: {done} of {len(wanted)} cells searched, {gained} of them with better tiles")


@dataclass(frozen=True)
class CellTask(Task):
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


def sweep(gpu: Machine, problem: Problem, pass_: str, binaries: Binaries, known: bool = False) -> Search:
    """The best tiles of a cell."""
    tried = dict[str, list[Finding]]()
    for step in _steps(problem, pass_):
        ranked = search.search(CellTask(gpu, problem, step, known), binaries)
        tried[step] = [f for f in ranked[:TOP] if f.violations or _is_sound_otherwise(f, binaries)]
        if step == "group" and any(not finding.violations for finding in tried[step]):
            break  # one kernel reads every tensor once, where several would read them again
    now = [
        finding
        for launch in pass_launches(gpu.target, problem, pass_)
        for finding in findings(Task(gpu, problem, launch.step), [launch.tile], binaries)
    ]
    return Search(gpu, problem, pass_, tried, search.choose(tried), now)


def _steps(problem: Problem, pass_: str) -> Iterator[str]:
    tokens, width = problem.partition.tokens, max(problem.key_width, problem.value_width)
    serves = {
        "group": tokens <= ONE_KERNEL,
        "columns": ONE_KERNEL < tokens <= COLUMNS and width <= NARROW,
        "pairs": problem.bias,
        "dk": width > WIDE,
        "dv": width > WIDE,
    }
    return (step for step in PASSES[pass_] if serves.get(step, True))


def _is_sound_otherwise(finding: Finding, binaries: Binaries) -> bool:
    """Whether the tile is sound for fp16 too, which shares bf16's, and where a forward pass writes lse."""
    task, problem = finding.task, finding.task.problem
    launches = list[Launch | None]()
    if problem.dtype == "bfloat16":
        launches.append(replace(task, problem=replace(problem, dtype="float16")).launch(finding.tile))
    if task.step == "forward":
        launches += forward_launches(task.gpu.target, problem, finding.tile, with_lse=True)
    return not any(verdict.violations for verdict in binaries.verdicts(filter(None, launches)))


def worth_writing(found: Search) -> list[Finding]:
    """The kernels with another tile than the one that serves now; none where what is gained is not worth an entry."""
    now, then = (
        (any(f.violations for f in kernels), sum(f.seconds for f in kernels))
        for kernels in (found.shipped, found.chosen)
    )
    if not found.chosen or then >= (now[0], (1 - WORTH) * now[1]):
        return []
    lead, before = found.chosen[0].task, ("group", "columns")
    if any(shipped_entry(lead.gpu.target, step, lead.problem) for step in before if step != lead.step):
        return found.chosen  # with a line that says that those kernels do not serve
    return [f for f in found.chosen if f.task.entry is None or f.task.entry.tile != f.tile]
