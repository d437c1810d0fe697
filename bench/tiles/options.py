"""What the tools of the workbench share: how a problem, a tile, a GPU and the machine that compiles are said."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from math import isqrt
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench import terminal
from bench.arguments import SHORT_DTYPES, dtype, positive
from bench.records import format_size, write_text
from bench.terminal import Terminal
from bench.tiles.binaries import Binaries
from bench.tiles.compile import DTYPES, PASSES, TILE, Problem
from bench.tiles.roofline import MACHINES, Machine
from isa_triton.partition import Partition
from isa_triton.tiles import Tile

TARGETS = list(dict.fromkeys(machine.target for machine in MACHINES.values()))
GROUPS = 8, 8  # of the maps that problems are made on
OF_AXES = {1: (64,), 2: GROUPS, 3: (4, 4, 4)}  # likewise, of lines, maps and volumes: 64 of each
PARTITIONS = {
    "interlaced": lambda size, group: Partition.interlaced(size, stride=OF_AXES[len(size)]),
    "local": Partition.local,
    "dense": lambda size, group: Partition.dense(group),
}
DEFAULTS: dict[str, Any] = {  # of a problem
    "tokens": 64, "widths": (256, 512), "partition": "interlaced", "heads": 1, "bias": False, "maps": 8,
    "dtype": "bf16",
}  # fmt: skip


# -- a problem ---------------------------------------------------------------------------------------------------------


def add_shape(parser: argparse.ArgumentParser) -> None:
    """What `problem` reads, but the dtype: none of it has a value unless it is given."""
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    what = "of a group: as many, in a map, or its sides, as 7x7x7 in a volume (default: {tokens})"
    add("--tokens", type=read_tokens, metavar="N", help=what.format(**DEFAULTS))
    widths = "default: {} {}".format(*DEFAULTS["widths"])
    add("--widths", nargs=2, type=positive, metavar=("K", "V"), help=widths)
    add("--partition", choices=PARTITIONS, help="default: {partition}".format(**DEFAULTS))
    add("--heads", type=positive, metavar="N", help="default: {heads}".format(**DEFAULTS))
    add("--bias", action="store_true", help="with a bias for every pair of tokens (default: without)")
    add("--maps", type=positive, metavar="N", help="in a batch (default: {maps})".format(**DEFAULTS))


def read_tokens(text: str) -> int | tuple[int, ...]:
    """The tokens of a group, "49", or its sides on one to three axes, "7x7x7"."""
    parts = text.split("x")
    if len(parts) > max(OF_AXES) or not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"must be so many as 64, or one to three sides as 7x7x7, got {text!r}")
    return tuple(map(int, parts)) if len(parts) > 1 else int(text)


def read_dtype(text: str) -> str:
    """A dtype as `isa_triton.tiles` names it, of that name or the short form."""
    if (name := dtype(text)) not in DTYPES:
        short = (short for short, name in SHORT_DTYPES.items() if name in DTYPES)
        raise argparse.ArgumentTypeError(f"must be one of {', '.join((*DTYPES, *short))}, got {text!r}")
    return name


def add_problem(parser: argparse.ArgumentParser) -> None:
    """A GPU, and the pass that it is given."""
    add = parser.add_argument
    add("--target", choices=TARGETS, help="architecture that is compiled for (default: the GPU's, or sm_90)")
    add("--gpu", choices=list(MACHINES), help="GPU that times are predicted for (default: the target's first)")
    add("--pass", dest="pass_", choices=PASSES, default="forward", help="of the kernels")
    add_shape(parser)
    what = "default: {dtype}; tf32 is fp32 in memory".format(**DEFAULTS)
    add("--dtype", type=read_dtype, default=argparse.SUPPRESS, help=what)


def given(args: argparse.Namespace, but: Sequence[str] = ()) -> str:
    """Those of the options of a problem that were given, but some, by name: "" where there are none."""
    return " ".join(f"--{name}" for name in DEFAULTS if hasattr(args, name) and name not in but)


def machine(args: argparse.Namespace) -> Machine:
    """The GPU, if the arguments agree with each other."""
    if args.gpu is None:
        return first_machine(args.target or "sm_90")
    found = MACHINES[args.gpu]
    if args.target not in (None, found.target):
        raise argparse.ArgumentError(None, f"--gpu {args.gpu} has the target {found.target}, not {args.target}")
    return found


def first_machine(target: str) -> Machine:
    """The first GPU of a target."""
    return next(machine for machine in MACHINES.values() if machine.target == target)


def problem(args: argparse.Namespace) -> Problem:
    """The problem that the arguments say, by default that of `DEFAULTS`."""
    said = {name: getattr(args, name, default) for name, default in DEFAULTS.items()}
    return make_problem(said.pop("tokens"), *said.pop("widths"), **said)


def make_problem(
    tokens: int | tuple[int, ...], key_width: int, value_width: int, partition: str = "interlaced", maps: int = 8,
    dtype: str = "bf16", **rest: Any,
) -> Problem:  # fmt: skip
    """Attention in 64 groups of `tokens` tokens, or a dense map of so many.

    Args:
        tokens: of a group in a map, as square as their number allows; or its sides, in a map or a volume.
        partition: one of `PARTITIONS`.
        dtype: as `read_dtype` takes it.
        rest: of `Problem`: heads and bias.
    """
    said, group = (str(tokens), ()) if isinstance(tokens, int) else (format_size(tokens), tokens)
    if isinstance(tokens, int):
        height = next(h for h in range(isqrt(tokens), 0, -1) if tokens % h == 0)
        group = height, tokens // height
    size = tuple(side * groups for side, groups in zip(group, OF_AXES[len(group)], strict=True))
    rest |= {"maps": maps, "dtype": read_dtype(dtype), "name": f"{partition} {said}"}
    return Problem(PARTITIONS[partition](size, group), key_width, value_width, **rest)


# -- a tile ------------------------------------------------------------------------------------------------------------


def tile(text: str) -> dict[str, int]:
    """What differs from the shipped tile: of "BLOCK_M=64,num_warps=8" two fields, of "shipped" none."""
    fields, found = dict(zip(TILE, Tile._fields, strict=True)), dict[str, int]()
    for part in [] if text == "shipped" else text.split(","):
        name, _, number = part.partition("=")
        if name not in fields or not number.isdecimal():
            wanted = ",".join(f"{name}=N" for name in TILE)
            raise argparse.ArgumentTypeError(f'must be "shipped" or what differs from it, of {wanted}; got {text!r}')
        found[fields[name]] = int(number)
    for name, n in found.items():
        if n < (16 if name.startswith("block") else 1) or (n & (n - 1) and name != "num_stages"):
            raise argparse.ArgumentTypeError(f"must have powers of two, and blocks from 16, got {text!r}")
    return found


def change(ratio: float) -> str:
    """A ratio as the difference from one: 0.55 is -45 %."""
    return f"{100 * (ratio - 1):+.0f} %"


# -- compilers ---------------------------------------------------------------------------------------------------------


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """What `pool` is given."""
    what = "compilers at a time (default: one a core)"
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), metavar="N", help=what)


def add_compilers(parser: argparse.ArgumentParser) -> None:
    """What `compilers` reads, and how tables are shown."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isa_triton"
    add_jobs(parser)
    add = parser.add_argument
    add("--cache", type=Path, default=cache, metavar="DIR", help=f"kernels and their figures (default: {cache})")
    terminal.add_arguments(parser)


def pool(jobs: int) -> ProcessPoolExecutor:
    """Processes that compile; nobody is started before there is work."""
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))


@contextmanager
def compilers(args: argparse.Namespace, said: Terminal, dump: Path | None = None) -> Iterator[Binaries]:
    """Binaries as `add_compilers` says, on processes of their own, with a bar for as long as they are wanted."""
    said.say(f"Binaries and their figures are kept in {args.cache}")
    with said.progress("binaries") as bar, pool(args.jobs) as processes:
        try:
            yield Binaries(args.cache, processes, dump, bar)
        except KeyboardInterrupt:
            processes.shutdown(cancel_futures=True)
            raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")
