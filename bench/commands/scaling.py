"""``python -m bench scaling``: FLOPs, peak bytes and seconds of every provider across resolutions."""

from __future__ import annotations

import argparse
from itertools import product

from rich.console import Console

from bench import survey
from bench.arguments import check_partition_size, folder, size
from bench.providers import COMPARED, PROVIDERS
from bench.records import format_size
from bench.results import QUANTITIES, plot, summary
from bench.workload import BLOCK_LEVELS, LEVELS, PASSES

HELP = "FLOPs, memory and time across resolutions: scaling.csv, flops.png, memory.png, time.png"
SIZES = ((32, 32), (64, 64), (64, 128), (97, 97), (128, 128), (128, 256), (256, 256), (512, 512))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=folder, default="out", metavar="DIR", help="folder of the results (default: out)")
    add(
        "--providers",
        nargs="+",
        choices=PROVIDERS,
        metavar="NAME",
        help=f"who is measured and drawn, of {' '.join(PROVIDERS)} (default: all, drawn {' '.join(COMPARED)})",
    )
    add(
        "--sizes",
        nargs="+",
        type=size,
        default=list(SIZES),
        metavar="SIZE",
        help="maps in pixels, 64 or 64x128, height first (default: " + " ".join(map(format_size, SIZES)) + ")",
    )
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="default: both")
    add("--level", nargs="+", choices=LEVELS, default=list(BLOCK_LEVELS), help="default: attention module")
    add("--partition-size", type=size, default=(8, 8), metavar="P", help="8 or 8x4, height first (default: 8)")
    survey.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    for map_ in args.sizes:
        check_partition_size(args.partition_size, map_)
    sizes = sorted(dict.fromkeys(args.sizes), key=lambda size: size[0] * size[1])
    workloads = [
        survey.workload(args, level, pass_, size, args.partition_size)
        for (level, pass_), size in product(product(args.level, args.passes), sizes)
    ]
    measured = [PROVIDERS[name] for name in args.providers or PROVIDERS]
    rows = survey.conduct(args, args.out / "scaling.csv", [(workload, measured) for workload in workloads])
    drawn = [row for row in rows if row.provider in (args.providers or COMPARED)]
    if not drawn:
        return  # the remarks above say why
    for quantity in QUANTITIES:
        plot(drawn, quantity, args.out / quantity.file)
    console = Console()
    console.width = max(console.width, 120)  # rather wrapped by the terminal than cut off
    for table in summary(rows):
        console.print(table)
    console.print("Wrote", *(args.out / quantity.file for quantity in QUANTITIES), sep="\n  ", highlight=False)
