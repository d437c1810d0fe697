"""``python -m bench scaling``: FLOPs, peak bytes and seconds of every provider across resolutions."""

from __future__ import annotations

import argparse
from itertools import product

from bench import figures, survey
from bench.arguments import add_out, check_partition_size, size
from bench.compared import DRAWN, PROVIDERS
from bench.cost import QUANTITIES, summary
from bench.records import console, format_size
from bench.workload import BLOCK_LEVELS, LEVELS

SIZES = ((32, 32), (64, 64), (64, 128), (97, 97), (128, 128), (128, 256), (256, 256), (512, 512))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_out(parser)
    add(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        metavar="NAME",
        help=f"who is measured and drawn, of {' '.join(PROVIDERS)} (default: all, drawn {' '.join(DRAWN)})",
    )
    maps = f"maps in pixels, 64 or 64x128, height first (default: {' '.join(map(format_size, SIZES))})"
    add("--sizes", nargs="+", type=size, default=list(SIZES), metavar="SIZE", help=maps)
    add("--level", nargs="+", choices=LEVELS, default=list(BLOCK_LEVELS), help="default: attention module")
    add("--partition-size", type=size, default=(8, 8), metavar="P", help="8 or 8x4, height first (default: 8)")
    survey.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    for map_ in args.sizes:
        check_partition_size(args.partition_size, map_)
    sizes = sorted(dict.fromkeys(args.sizes), key=lambda size: size[0] * size[1])
    measured = [PROVIDERS[name] for name in args.providers or PROVIDERS]
    plan = [
        (survey.workload(args, level, pass_, size, args.partition_size), measured)
        for level, pass_, size in product(args.level, args.passes, sizes)
    ]
    rows = survey.conduct(args, args.out / "scaling.csv", plan)
    drawn = [row for row in rows if row.provider in (args.providers or DRAWN)]
    if not drawn:
        return  # the remarks above say why
    for quantity in QUANTITIES:
        figures.scaling(drawn, quantity, args.out / quantity.file)
    terminal = console(120)
    for table in summary(rows):
        terminal.print(table)
    terminal.print("Wrote", *(args.out / quantity.file for quantity in QUANTITIES), sep="\n  ")
