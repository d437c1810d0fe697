"""``python -m bench partitions``: what the partition size, the order of the stages and parallel branches cost.

`long-short` and `short-long` are both stages in either order, `long` and `short` one stage alone. `module P` is the ISA
module, which joins the context with its input, and `module P, 2P` the same with two partition sizes in parallel.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from itertools import product

from torch import nn

from bench import figures, records, survey
from bench.arguments import PREFIX, add_axes, add_out, check_partition_size, on_axes, sides
from bench.compared import Provider
from bench.compared.modules import in_stages
from bench.scaling import PARTITION_SIZE
from bench.terminal import Table, Terminal
from bench.workload import BLOCK_LEVELS, Cost, Quantity, Workload, tabled
from isa_triton import InterlacedSparseSelfAttention, ISAModule, partitioned_attention
from isa_triton.modules import STAGES as STAGES_BY_AXES

SIZE = {1: (16384,), 2: (128, 128), 3: (32, 32, 32)}  # by axes
WINDOWS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((4,), (16,), (64,), (128,), (256,), (1024,), (4096,)),
    2: ((2, 2), (4, 4), (8, 8), (12, 12), (16, 16), (32, 32), (64, 64)),
    3: ((2, 2, 2), (4, 4, 4), (6, 6, 6), (8, 8, 8), (16, 16, 16)),
}


def block(order: str, workload: Workload) -> nn.Module:
    """Both stages with their projections."""
    return InterlacedSparseSelfAttention(
        *workload.widths, axes=len(workload.size), partition_size=workload.partition_size, order=order
    )


def stage(pattern: str, workload: Workload) -> nn.Module:
    """One stage with its projections."""
    kind = STAGES_BY_AXES[len(workload.size)]
    return kind(*workload.widths, pattern=pattern, partition_size=workload.partition_size)


def branches(factors: Sequence[int], workload: Workload) -> nn.Module:
    """The ISA module with a branch for every factor, of so many times the partition size."""
    sizes = [tuple(part * factor for part in workload.partition_size) for factor in factors]
    return ISAModule(*workload.widths, workload.channels, axes=len(workload.size), partition_size=sizes)


STAGES = tuple(
    Provider(name, in_stages(partitioned_attention, patterns), module, volumes=True)
    for name, patterns, module in (
        ("long-short", ("interlaced", "local"), partial(block, "long-short")),
        ("short-long", ("local", "interlaced"), partial(block, "short-long")),
        ("long", ("interlaced",), partial(stage, "interlaced")),
        ("short", ("local",), partial(stage, "local")),
    )
)
MODULES = tuple(
    Provider(name, module=partial(branches, factors), volumes=True)
    for name, factors in (("module P", (1,)), ("module P, 2P", (1, 2)), ("module P, 2P, 4P", (1, 2, 4)))
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_out(parser)
    add_axes(parser)
    add("--size", type=sides, metavar="SIZE", help="the map, 64 or 64x128 (default: 128; of volumes 32)")
    default = f"{' '.join(map(records.format_size, WINDOWS[2]))}, as far as the map has room"
    add("--partition-sizes", nargs="+", type=sides, metavar="P", help=f"8 or 8x4, height first (default: {default})")
    add("--partition-size", type=sides, metavar="P", help="P of the ISA modules, likewise (default: 8; of volumes 4)")
    survey.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    axes = args.axes
    size = on_axes("size", args.size or SIZE[axes], axes)
    chosen = on_axes("partition-size", args.partition_size or PARTITION_SIZE[axes], axes)
    wanted = [on_axes("partition-sizes", p, axes) for p in args.partition_sizes or WINDOWS[axes]]
    if not args.partition_sizes:
        wanted = [p for p in wanted if all(part <= side for part, side in zip(p, size, strict=True))]
    windows = sorted({*wanted, chosen}, key=lambda p: (math.prod(p), p))
    for window in windows:
        check_partition_size(window, size)
    plan: list[tuple[Workload, Sequence[Provider]]] = []
    for level, pass_, window in product(BLOCK_LEVELS, args.passes, windows):
        modules = MODULES if level == "module" and window == chosen else ()
        plan.append((survey.workload(args, level, pass_, size, window), STAGES + modules))
    said, path = Terminal(args), args.out / f"{PREFIX[axes]}partitions.csv"
    rows = survey.conduct(args, said, path, plan)
    there = {row.panel for row in rows}  # a CSV that is drawn again may have less
    passes = [pass_ for pass_ in args.passes if {(level, pass_) for level in BLOCK_LEVELS} <= there]
    pictures = {pass_: args.out / f"{PREFIX[axes]}partition_sizes_{pass_}.png" for pass_ in passes}
    for pass_, picture in pictures.items():
        figures.partition_sizes([row for row in rows if row.pass_ == pass_], chosen, picture)
    said.show(*summary(rows))
    written = [] if args.redraw else [path]
    said.end(f"{survey.tally(rows)} {figures.cheapest(rows)}.", *written, *pictures.values())


def summary(rows: Sequence[Cost]) -> list[Table]:
    """A table for each level and pass: what every variant costs at every partition size."""
    panels = {row.panel: [other for other in rows if other.panel == row.panel] for row in rows}
    quantities = tabled(rows)
    header = ("variant", "partition", *(quantity.unit for quantity in quantities))
    return [
        Table(f"{level} level, {pass_}", header, [_line(row, quantities) for row in members], words=2)
        for (level, pass_), members in panels.items()
    ]


def _line(row: Cost, quantities: Sequence[Quantity]) -> list[str | None]:
    values = (quantity.of(row) for quantity in quantities)
    numbers = [None if value is None else records.short(value) for value in values]
    return [row.provider, row.partition_size, *numbers[:-1], f"{numbers[-1]}?" if row.doubtful else numbers[-1]]
