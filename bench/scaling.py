"""``python -m bench scaling``: FLOPs, peak bytes and seconds of every provider across resolutions."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from bench import figures, survey
from bench.arguments import PREFIX, add_axes, add_out, check_partition_size, on_axes, sides
from bench.compared import DRAWN, PROVIDERS
from bench.records import format_size, short
from bench.terminal import Table, Terminal
from bench.workload import BLOCK_LEVELS, LEVELS, OURS, QUANTITIES, Cost, Level, Pass, Quantity, tabled

SIZES: dict[int, tuple[tuple[int, ...], ...]] = {  # by axes
    1: ((1024,), (4096,), (9409,), (16384,), (65536,)),
    2: ((32, 32), (64, 64), (64, 128), (97, 97), (128, 128), (128, 256), (256, 256), (512, 512)),
    3: ((16, 16, 16), (16, 32, 32), (25, 25, 25), (32, 32, 32), (64, 64, 64)),
}
PARTITION_SIZE = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_out(parser)
    who = f"who is measured and drawn, of {' '.join(PROVIDERS)} (default: all, drawn {' '.join(DRAWN)})"
    add("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help=who)
    add("--twice", action="store_true", help="every provider once more, as NAME-again: how they differ is noise")
    add_axes(parser)
    add("--sizes", nargs="+", type=sides, metavar="SIZE", help="maps in pixels, 64 or 64x128, height first")
    add("--levels", nargs="+", choices=LEVELS, default=list(BLOCK_LEVELS), help="of what is measured")
    add("--partition-size", type=sides, metavar="P", help="P of ISA, 8 or 8x4, height first (default: 8; of volumes 4)")
    survey.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    p = on_axes("partition-size", args.partition_size or PARTITION_SIZE[args.axes], args.axes)
    sizes = [on_axes("sizes", size, args.axes) for size in args.sizes or SIZES[args.axes]]
    for size in sizes:
        check_partition_size(p, size)
    sizes = sorted(dict.fromkeys(sizes), key=math.prod)
    measured = [PROVIDERS[name] for name in args.providers or PROVIDERS]
    again = [provider.again() for provider in measured] if args.twice else []
    plan = [
        (survey.workload(args, level, pass_, size, p), [*measured, *again])
        for level, pass_, size in product(args.levels, args.passes, sizes)
    ]
    prefix = PREFIX[args.axes]
    said, path = Terminal(args), args.out / f"{prefix}scaling.csv"
    rows = survey.conduct(args, said, path, plan)
    shown = {*(args.providers or (PROVIDERS if args.verbose else figures.HEADLINE)), *(each.name for each in again)}
    said.show(*summary([row for row in rows if row.provider in shown]))
    pictures = draw([row for row in rows if row.provider in (args.providers or DRAWN)], args.out, prefix)
    written = [] if args.redraw else [path]
    said.end(survey.tally(rows))
    said.end("\n".join(figures.message(rows, each) for each in QUANTITIES if rows), *written, *pictures)


def draw(rows: Sequence[Cost], folder: Path, prefix: str = "") -> list[Path]:
    """The figure of one panel, then one of all panels a quantity; none of no rows. Returns their paths."""
    if not rows:
        return []
    paths = [folder / f"{prefix}{name}" for name in ("scaling.png", *(quantity.file for quantity in QUANTITIES))]
    figures.headline(rows, paths[0])
    for quantity, path in zip(QUANTITIES, paths[1:], strict=True):
        figures.scaling(rows, quantity, path)
    return paths


def summary(rows: Sequence[Cost]) -> list[Table]:
    """A table for each level and pass: for each quantity ours per map, and everyone as so many times ours."""
    panels = {row.panel: [other for other in rows if other.panel == row.panel] for row in rows}
    return [_summary(members, *panel) for panel, members in panels.items()]


def _summary(rows: Sequence[Cost], level: Level, pass_: Pass) -> Table:
    cells = {(row.provider, row.size): row for row in rows}
    names, sizes = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    relative = f" ({OURS} in units, the others in times {OURS}; ?: doubtful)" if OURS in names else ""
    lines: list[list[str]] = []
    for quantity in tabled(rows):
        for name in names:
            values = [_cell(quantity, cells.get((name, size)), cells.get((OURS, size))) for size in sizes]
            lines.append([quantity.unit, name, *values])
        lines.append([])
    return Table(f"{level} level, {pass_}{relative}", ["in", "provider", *map(format_size, sizes)], lines, words=2)


def _cell(quantity: Quantity, row: Cost | None, ours: Cost | None) -> str:
    """A value in units, or in times ours; a dash where it is not known."""
    value, unit = (None if each is None else quantity.of(each) for each in (row, ours))
    if row is None or value is None:
        return "-"
    doubt = "?" if quantity.column == "seconds" and row.doubtful else ""
    if unit and row is not ours:
        return f"{short(value / unit)}x{doubt}"
    return (short(value) if value < 100 else f"{value:,.0f}") + doubt
