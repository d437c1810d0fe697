"""``python -m bench scaling``: FLOPs, peak bytes and seconds of every provider across resolutions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from bench import figures, survey
from bench.arguments import add_out, add_partition_size, add_sizes, check_partition_size
from bench.compared import DRAWN, PROVIDERS
from bench.records import format_size, short
from bench.terminal import Table, Terminal
from bench.workload import BLOCK_LEVELS, LEVELS, OURS, QUANTITIES, Cost, Level, Pass, Quantity, tabled

SIZES = ((32, 32), (64, 64), (64, 128), (97, 97), (128, 128), (128, 256), (256, 256), (512, 512))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_out(parser)
    who = f"who is measured and drawn, of {' '.join(PROVIDERS)} (default: all, drawn {' '.join(DRAWN)})"
    add("--providers", nargs="+", choices=PROVIDERS, metavar="NAME", help=who)
    add("--twice", action="store_true", help="every provider once more, as NAME-again: how they differ is noise")
    add_sizes(parser, SIZES)
    add("--levels", nargs="+", choices=LEVELS, default=list(BLOCK_LEVELS), help="of what is measured")
    add_partition_size(parser)
    survey.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    for map_ in args.sizes:
        check_partition_size(args.partition_size, map_)
    sizes = sorted(dict.fromkeys(args.sizes), key=lambda size: size[0] * size[1])
    measured = [PROVIDERS[name] for name in args.providers or PROVIDERS]
    again = [provider.again() for provider in measured] if args.twice else []
    plan = [
        (survey.workload(args, level, pass_, size, args.partition_size), [*measured, *again])
        for level, pass_, size in product(args.levels, args.passes, sizes)
    ]
    said, path = Terminal(args), args.out / "scaling.csv"
    rows = survey.conduct(args, said, path, plan)
    shown = {*(args.providers or (PROVIDERS if args.verbose else figures.HEADLINE)), *(each.name for each in again)}
    said.show(*summary([row for row in rows if row.provider in shown]))
    pictures = draw([row for row in rows if row.provider in (args.providers or DRAWN)], args.out)
    written = [] if args.redraw else [path]
    said.end(survey.tally(rows))
    said.end("\n".join(figures.message(rows, each) for each in QUANTITIES if rows), *written, *pictures)


def draw(rows: Sequence[Cost], folder: Path) -> list[Path]:
    """The figure of one panel, then one of all panels a quantity; none of no rows. Returns their paths."""
    if not rows:
        return []
    figures.headline(rows, folder / "scaling.png")
    for quantity in QUANTITIES:
        figures.scaling(rows, quantity, folder / quantity.file)
    return [folder / name for name in ("scaling.png", *(quantity.file for quantity in QUANTITIES))]


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
