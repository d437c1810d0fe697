"""What the tools of the workbench share: how a problem, a GPU and the machine that compiles are said."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from math import isqrt
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.arguments import positive
from bench.records import write_text
from bench.tiles.binaries import Binaries
from bench.tiles.compile import DTYPES, Problem
from bench.tiles.roofline import MACHINES, Machine
from isa_triton.partition import Partition

DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
WIDTH = 170  # of a console with room for a line a binary
GROUPS = 8, 8  # of the maps that problems are made on
PARTITIONS = {
    "interlaced": lambda size, group: Partition.interlaced(size, stride=GROUPS),
    "local": Partition.local,
    "dense": lambda size, group: Partition.dense(group),
}


def add_problem(parser: argparse.ArgumentParser) -> None:
    """A GPU, and the problem that it is given."""
    add, targets = parser.add_argument, sorted({machine.target for machine in MACHINES.values()})
    add("--target", choices=targets, default="sm_90", help="architecture that is compiled for (default: sm_90)")
    add("--gpu", choices=list(MACHINES), help="GPU that times are predicted for (default: the target's first)")
    add("--pass", dest="pass_", choices=("forward", "backward"), default="forward", help="default: forward")
    add("--widths", nargs=2, type=positive, default=[256, 512], metavar=("K", "V"), help="default: 256 512")
    add("--tokens", type=positive, default=64, help="of a group (default: 64)")
    add("--partition", choices=PARTITIONS, default="interlaced", help="default: interlaced")
    add("--heads", type=positive, default=1, help="default: 1")
    add("--bias", action="store_true", help="with a bias for every pair of tokens")
    add("--dtype", choices=[*DTYPES, *DTYPE_ALIASES], default="bf16", help="default: bf16; tf32 is fp32 in memory")
    add("--maps", type=positive, default=8, help="in a batch (default: 8)")


def machine(args: argparse.Namespace) -> Machine:
    """The GPU, if the arguments agree with each other."""
    found = MACHINES[args.gpu] if args.gpu else next(m for m in MACHINES.values() if m.target == args.target)
    if found.target != args.target:
        raise argparse.ArgumentError(None, f"--gpu {args.gpu} has the target {found.target}, not {args.target}")
    return found


def problem(args: argparse.Namespace) -> Problem:
    """The problem of `add_problem`'s arguments."""
    rest = {name: getattr(args, name) for name in ("partition", "heads", "bias", "maps")}
    return make_problem(args.tokens, *args.widths, **rest, dtype=DTYPE_ALIASES.get(args.dtype, args.dtype))


def make_problem(
    tokens: int, key_width: int, value_width: int, partition: str = "interlaced", maps: int = 8, **rest: Any
) -> Problem:
    """Attention in groups of `tokens` tokens, as square as their number allows: 8 x 8 groups, or a dense map.

    Args:
        partition: one of `PARTITIONS`.
        rest: of `Problem`: heads, bias and dtype.
    """
    height = next(h for h in range(isqrt(tokens), 0, -1) if tokens % h == 0)
    group = height, tokens // height
    size = group[0] * GROUPS[0], group[1] * GROUPS[1]
    return Problem(PARTITIONS[partition](size, group), key_width, value_width, maps=maps, **rest)


def add_compilers(parser: argparse.ArgumentParser) -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isa_triton"
    add = parser.add_argument
    add("--jobs", type=positive, default=os.cpu_count(), help="compilers at a time (default: one a core)")
    add("--cache", type=Path, default=cache, metavar="DIR", help=f"kernels and their figures (default: {cache})")


@contextmanager
def compilers(args: argparse.Namespace, dump: Path | None = None) -> Iterator[Binaries]:
    """Binaries as `add_compilers` says, on processes of their own."""
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:  # starts nobody before there is work
        try:
            yield Binaries(args.cache, pool, dump)
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise


def progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=console)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")
