"""Compile ahead, into Triton's own cache: a process that finds it there compiles nothing when it attends.

By default what networks launch that people run, as `tiles verify` has them; --tokens, --widths and the rest say another
problem. Triton's cache is ~/.triton/cache, or where TRITON_CACHE_DIR says; it may be copied to a machine with the GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, as_completed
from dataclasses import replace
from pathlib import Path

from triton import knobs

from bench import terminal
from bench.terminal import Terminal
from bench.tiles import options, verify
from bench.tiles.binaries import LIMITS
from bench.tiles.compile import DTYPES, PASSES, Launch, Problem, compile_launch, pass_launches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, names = parser.add_argument, list(verify.SHAPES)
    add("--targets", nargs="+", choices=LIMITS, default=["sm_90"], metavar="TARGET",
        help=f"of {' '.join(LIMITS)} (default: sm_90)")  # fmt: skip
    add("--shapes", nargs="+", choices=names, metavar="SHAPE", help=f"of {', '.join(names)} (default: all)")
    options.add_shape(parser)
    add("--dtypes", nargs="+", type=options.read_dtype, default=["bfloat16"], metavar="DTYPE",
        help=f"of {' '.join(DTYPES)} (default: bfloat16)")  # fmt: skip
    options.add_jobs(parser)
    terminal.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    said, cache = Terminal(args), Path(knobs.cache.dir)
    problems = [replace(problem, dtype=dtype) for problem in verify.problems(args) for dtype in args.dtypes]
    wanted = {launch.key: launch for target in args.targets for launch in launches(target, problems)}
    with options.pool(args.jobs) as pool, said.progress("binaries", len(wanted)) as bar:
        for launch in compiled(wanted.values(), cache, pool):
            bar.now(f"{launch.target} {launch.problem.name} {launch.label}")
            bar.advance()
    said.end(f"{len(wanted)} binaries for {' '.join(args.targets)} are in Triton's cache.", cache)


def launches(target: str, problems: list[Problem]) -> Iterator[Launch]:
    """What inference and training launch."""
    for problem in problems:
        for pass_ in PASSES:
            for training in (False, True):
                yield from pass_launches(target, problem, pass_, training)


def compiled(wanted: Iterable[Launch], cache: Path, pool: Executor) -> Iterator[Launch]:
    """Each launch, when it is compiled."""
    pending = {pool.submit(_compile, launch, cache): launch for launch in wanted}
    for done in as_completed(pending):
        done.result()
        yield pending[done]


def _compile(launch: Launch, cache: Path) -> None:
    compile_launch(launch, cache)  # and what it returns stays in its process
