"""Compile ahead, into Triton's own cache: a process that finds it there compiles nothing when it attends.

By default what networks launch that people run, as `tiles verify` has them; --tokens, --widths and the rest say another
problem, --sizes and --batches other maps of each. Triton's cache is ~/.triton/cache, or where TRITON_CACHE_DIR says; it
may be copied to a machine with the GPU. The table says how many binaries a kernel has over these maps, and how many it
would have were its integers specialised as Triton does by itself: by which are 1, which 16 divides, which need 64 bits.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import triton.language as tl
from triton import knobs

from bench import terminal
from bench.arguments import add_sizes, positive
from bench.terminal import Table, Terminal
from bench.tiles import options, verify
from bench.tiles.binaries import LIMITS
from bench.tiles.compile import DTYPES, PASSES, Launch, Problem, compile_launch, pass_launches
from isa_triton.backend.kernels.plan import Pointer
from isa_triton.partition import Partition


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, names = parser.add_argument, list(verify.SHAPES)
    add("--targets", nargs="+", choices=LIMITS, default=["sm_90"], metavar="TARGET",
        help=f"of {' '.join(LIMITS)} (default: sm_90)")  # fmt: skip
    add(
        "--shapes",
        nargs="+",
        choices=names,
        metavar="SHAPE",
        help=f"of {', '.join(names)} (default: all but the volumes)",
    )
    options.add_shape(parser)
    add_sizes(parser, (), "maps of each, whose groups stay as they are (default, and always of volumes: its own)")
    add("--batches", nargs="+", type=positive, default=[], metavar="N", help="maps in a batch (default: as --maps)")
    add("--dtypes", nargs="+", type=options.read_dtype, default=["bfloat16"], metavar="DTYPE",
        help=f"of {' '.join(DTYPES)} (default: bfloat16)")  # fmt: skip
    options.add_jobs(parser)
    terminal.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    said, cache = Terminal(args), Path(knobs.cache.dir)
    problems = [replace(problem, dtype=dtype) for problem in verify.problems(args) for dtype in args.dtypes]
    found = [launch for target in args.targets for launch in launches(target, on_maps(problems, args))]
    wanted = {launch.key: launch for launch in found}
    with options.pool(args.jobs) as pool, said.progress("binaries", len(wanted)) as bar:
        for launch in compiled(wanted.values(), cache, pool):
            bar.now(f"{launch.target} {launch.problem.name} {launch.label}")
            bar.advance()
    said.show(table(found))
    said.end(f"{len(wanted)} binaries for {' '.join(args.targets)} are in Triton's cache.", cache)


def launches(target: str, problems: list[Problem]) -> Iterator[Launch]:
    """What inference and training launch."""
    for problem in problems:
        for pass_ in PASSES:
            for training in (False, True):
                yield from pass_launches(target, problem, pass_, training)


def on_maps(problems: Iterable[Problem], args: argparse.Namespace) -> list[Problem]:
    """Each problem on the maps of --sizes in the batches of --batches, or on its own; volumes always on theirs."""
    return [
        replace(problem, partition=resized(problem, size), maps=maps)
        for problem in problems
        for size in (len(problem.partition) == 2 and args.sizes) or [problem.partition.size]
        for maps in args.batches or [problem.maps]
    ]


def resized(problem: Problem, size: tuple[int, ...]) -> Partition:
    """A problem's partition on another map, as layers make it: windows and grids keep their tokens, strides their step.

    Raises:
        argparse.ArgumentError: the map is smaller than a window, a grid or a step.
    """
    axes = problem.partition
    tokens = tuple(axis.tokens for axis in axes)
    try:
        if size == problem.partition.size:
            return problem.partition
        if problem.partition.groups == 1:
            return Partition.dense(size)
        if all(axis.token_stride == 1 for axis in axes):
            return Partition.local(size, tokens)
        if problem.bias:  # which has a number for every pair of tokens
            return Partition.interlaced(size, grid=tokens)
        return Partition.interlaced(size, stride=tuple(axis.token_stride for axis in axes))
    except ValueError as error:
        raise argparse.ArgumentError(None, f"--sizes: {problem.name}: {error}") from error


def table(found: Iterable[Launch]) -> Table:
    """A line for every kernel and tile of a problem: how many binaries it has, and would have by Triton's own rule."""
    binaries = defaultdict[tuple[str, ...], tuple[set[str], set[object], set[Problem]]](lambda: (set(), set(), set()))
    for launch in found:
        names = launch.target, launch.problem.name, launch.problem.dtype, launch.label, ",".join(map(str, launch.tile))
        ours, tritons, problems = binaries[names]
        ours.add(launch.key)
        tritons.add(specialised_by_triton(launch))
        problems.add(launch.problem)
    header = ("target", "problem", "dtype", "kernel", "tile", "maps", "binaries", "by Triton's rule")
    lines = [[*names, len(problems), len(ours), len(tritons)]
             for names, (ours, tritons, problems) in binaries.items()]  # fmt: skip
    return Table("Binaries of a kernel and tile", header, lines, words=5)


def specialised_by_triton(launch: Launch) -> object:
    """What Triton's launcher would compile a launch's binary by: all constants, and of every integer how it may be."""

    def kind(value: Any, name: str) -> object:
        if isinstance(value, Pointer):
            return value.element, value.aligned
        if isinstance(value, tuple):
            return tuple(kind(part, name) for part in value)
        if isinstance(value, tl.constexpr) or type(value) is not int:
            return None if isinstance(value, float) else str(value)
        if name in constants:
            return value
        return value == 1, value % 16 == 0, abs(value) >= 2**31

    kernel = launch.planned.kernel
    constants = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    return launch.name, launch.tile, tuple(kind(value, name) for name, value in launch.arguments.items())


def compiled(wanted: Iterable[Launch], cache: Path, pool: Executor) -> Iterator[Launch]:
    """Each launch, when it is compiled."""
    pending = {pool.submit(_compile, launch, cache): launch for launch in wanted}
    for done in as_completed(pending):
        done.result()
        yield pending[done]


def _compile(launch: Launch, cache: Path) -> None:
    compile_launch(launch, cache)  # and what it returns stays in its process
