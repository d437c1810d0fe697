"""``python -m bench partitions``: what the partition size, the order of the stages and parallel branches cost.

`long-short` and `short-long` are both stages in either order, `long` and `short` one stage alone. `module P` is the ISA
module, which joins the context with its input, and `module P, 2P` the same with two partition sizes in parallel.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import product

from torch import nn

from bench import figures, records, survey
from bench.arguments import add_out, add_partition_size, check_partition_size, size
from bench.compared import Provider
from bench.compared.modules import in_stages
from bench.terminal import Table, Terminal
from bench.workload import BLOCK_LEVELS, Cost, Quantity, Workload, tabled
from isa_triton import InterlacedSparseSelfAttention, ISAModule, SelfAttention2d, partitioned_attention

WINDOWS = ((2, 2), (4, 4), (8, 8), (12, 12), (16, 16), (32, 32), (64, 64))


def block(order: str, workload: Workload) -> nn.Module:
    """Both stages with their projections."""
    return InterlacedSparseSelfAttention(*workload.widths, partition_size=workload.partition_size, order=order)


def stage(pattern: str, workload: Workload) -> nn.Module:
    """One stage with its projections."""
    return SelfAttention2d(*workload.widths, pattern=pattern, partition_size=workload.partition_size)


def branches(factors: Sequence[int], workload: Workload) -> nn.Module:
    """The ISA module with a branch for every factor, of so many times the partition size."""
    P_h, P_w = workload.partition_size
    sizes = [(P_h * factor, P_w * factor) for factor in factors]
    return ISAModule(*workload.widths, workload.channels, partition_size=sizes)


STAGES = (
    Provider("long-short", in_stages(partitioned_attention), partial(block, "long-short")),
    Provider("short-long", in_stages(partitioned_attention, ("local", "interlaced")), partial(block, "short-long")),
    Provider("long", in_stages(partitioned_attention, ("interlaced",)), partial(stage, "interlaced")),
    Provider("short", in_stages(partitioned_attention, ("local",)), partial(stage, "local")),
)
MODULES = tuple(
    Provider(name, module=partial(branches, factors))
    for name, factors in (("module P", (1,)), ("module P, 2P", (1, 2)), ("module P, 2P, 4P", (1, 2, 4)))
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_out(parser)
    add("--size", type=size, default=(128, 128), metavar="SIZE", help="the map, 64 or 64x128")
    default = f"{' '.join(map(records.format_size, WINDOWS))}, as far as the map has room"
    add("--partition-sizes", nargs="+", type=size, metavar="P", help=f"8 or 8x4, height first (default: {default})")
    add_partition_size(parser, "P of the ISA modules")
    survey.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    wanted = args.partition_sizes or [p for p in WINDOWS if p[0] <= args.size[0] and p[1] <= args.size[1]]
    windows = sorted({*wanted, args.partition_size}, key=lambda p: (p[0] * p[1], p))
    for window in windows:
        check_partition_size(window, args.size)
    plan: list[tuple[Workload, Sequence[Provider]]] = []
    for level, pass_, window in product(BLOCK_LEVELS, args.passes, windows):
        modules = MODULES if level == "module" and window == args.partition_size else ()
        plan.append((survey.workload(args, level, pass_, args.size, window), STAGES + modules))
    said, path = Terminal(args), args.out / "partitions.csv"
    rows = survey.conduct(args, said, path, plan)
    there = {row.panel for row in rows}  # a CSV that is drawn again may have less
    passes = [pass_ for pass_ in args.passes if {(level, pass_) for level in BLOCK_LEVELS} <= there]
    pictures = {pass_: args.out / f"partition_sizes_{pass_}.png" for pass_ in passes}
    for pass_, picture in pictures.items():
        figures.partition_sizes([row for row in rows if row.pass_ == pass_], args.partition_size, picture)
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
