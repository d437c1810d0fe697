"""What the tools of the workbench share: how a problem, a GPU and the machine that compiles are said."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from math import isqrt
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.arguments import positive
from bench.records import write_text
from bench.tiles.compile import DTYPES, Problem
from bench.tiles.roofline import MACHINES, Machine
from isa_triton.partition import Partition

SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
PARTITIONS = ("interlaced", "local", "dense")
GROUPS = 8, 8  # of the maps that problems are made on


def add_machine(parser: argparse.ArgumentParser) -> None:
    targets = sorted({machine.target for machine in MACHINES.values()})
    add = parser.add_argument
    add("--target", choices=targets, default="sm_90", help="architecture that is compiled for (default: sm_90)")
    add("--gpu", choices=list(MACHINES), help="GPU that times are predicted for (default: the target's first)")


def machine(args: argparse.Namespace) -> Machine:
    """The GPU, if the arguments agree with each other."""
    found = MACHINES[args.gpu] if args.gpu else next(m for m in MACHINES.values() if m.target == args.target)
    if found.target != args.target:
        raise argparse.ArgumentError(None, f"--gpu {args.gpu} has the target {found.target}, not {args.target}")
    return found


def add_problem(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--pass", dest="pass_", choices=("forward", "backward"), default="forward", help="default: forward")
    add("--widths", nargs=2, type=positive, default=[256, 512], metavar=("K", "V"), help="default: 256 512")
    add("--tokens", type=positive, default=64, help="of a group (default: 64)")
    add("--partition", choices=PARTITIONS, default="interlaced", help="default: interlaced")
    add("--heads", type=positive, default=1, help="default: 1")
    add("--bias", action="store_true", help="with a bias for every pair of tokens")
    add("--dtype", choices=[*DTYPES, *SHORT], default="bf16", help="default: bf16; tf32 is fp32 in memory")
    add("--maps", type=positive, default=8, help="in a batch (default: 8)")


def problem(args: argparse.Namespace) -> Problem:
    """The problem of `add_problem`'s arguments."""
    key, value = args.widths
    dtype = SHORT.get(args.dtype, args.dtype)
    return make_problem(args.tokens, key, value, args.partition, args.heads, args.bias, dtype, args.maps)


def make_problem(
    tokens: int,
    key_width: int,
    value_width: int,
    partition: str = "interlaced",
    heads: int = 1,
    bias: bool = False,
    dtype: str = "bfloat16",
    maps: int = 8,
) -> Problem:
    """Attention in groups of `tokens` tokens, as square as their number allows: 8 x 8 groups, or a dense map."""
    height = next(h for h in range(isqrt(tokens), 0, -1) if tokens % h == 0)
    group = height, tokens // height
    size = group[0] * GROUPS[0], group[1] * GROUPS[1]
    geometry = {
        "interlaced": lambda: Partition.interlaced(size, stride=GROUPS),
        "local": lambda: Partition.local(size, group),
        "dense": lambda: Partition.dense(group),
    }[partition]()
    return Problem(geometry, key_width, value_width, heads, bias, dtype, maps)


def describe(problem: Problem) -> str:
    """One line."""
    (height, width), p = problem.partition.size, problem.partition
    kind = "dense" if p.groups == 1 else "local" if p.w.token_stride == 1 and p.h.token_stride == 1 else "interlaced"
    bias = ", bias" if problem.bias else ""
    return (
        f"{kind}, {p.tokens} tokens, K = {problem.key_width}, V = {problem.value_width}, {problem.heads} heads{bias}, "
        f"{problem.dtype}, {problem.maps} maps of {height}x{width}"
    )


def add_compilers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--jobs", type=positive, default=os.cpu_count(), help="compilers at a time (default: one a core)")
    add("--cache", type=Path, default=default_cache(), metavar="DIR", help=f"default: {default_cache()}")


def default_cache() -> Path:
    """Where compiled kernels and their figures are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isa_triton"


@contextmanager
def compilers(jobs: int) -> Iterator[Executor]:
    """Processes that compile."""
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:  # starts nobody before there is work
        try:
            yield pool
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def wide_console() -> Console:
    """A console with room for a line a binary, also where no terminal is."""
    return Console(width=max(Console().width, 170))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")
