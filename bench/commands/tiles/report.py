"""One pass under the lens: what its kernels cost, what they waste, what bounds them, on a GPU that need not be here.

Resources and instructions are read from the binary, bytes and products from Triton's IR; times are PREDICTED from both
(bench/tiles/roofline.py). Without --tile the kernels are those that the run time would launch.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from bench.arguments import positive
from bench.commands.tiles.common import (
    add_compilers,
    add_machine,
    add_problem,
    describe,
    machine,
    make_problem,
    problem,
    wide_console,
    write_json,
)
from bench.records import write_whole
from bench.tiles.assembly import UNITS
from bench.tiles.compile import Launch, Problem
from bench.tiles.passes import Kernel, Whole, kernel, pass_launches
from bench.tiles.roofline import MACHINES
from bench.tiles.search import KERNELS, PASSES, Task
from bench.tiles.verify import Verifier
from isa_triton.tiles import Tile

HELP = "one pass: resources, instructions, waste, bytes, and the time that they predict"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_machine(parser)
    add_problem(parser)
    add = parser.add_argument
    tile = ("M", "N", "K", "V", "WARPS", "STAGES")
    add(
        "--tile",
        nargs=6,
        type=positive,
        metavar=tile,
        help="of --step: queries, keys, chunks of K and V, warps, stages",
    )
    add("--step", choices=list(KERNELS), help="the kernel that --tile is for (default: forward)")
    add("--bounds", action="store_true", help="instead: H100's predictions beside the bounds that are promised for it")
    add("--csv", type=Path, metavar="FILE", help="write the lines of --bounds there")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    console, verifier = wide_console(), Verifier(args.cache)
    if args.bounds:
        lines = _bounds(verifier)
        console.print(_bounds_table(lines))
        if args.csv is not None:
            write_whole(args.csv, BOUND_COLUMNS, lines)
        return
    if args.csv is not None:
        raise argparse.ArgumentError(None, "--csv is for --bounds; one pass goes into --json")
    gpu, wanted = machine(args), problem(args)
    try:
        kernels = [kernel(launch, wanted, gpu, verifier) for launch in _launches(args, wanted)]
    except ValueError as error:
        raise argparse.ArgumentError(None, str(error)) from error
    console.print(f"{args.pass_} on {gpu.name} ({args.target}): {describe(wanted)}", highlight=False)
    console.print(_table(kernels))
    console.print(Whole(wanted, args.pass_, gpu, kernels).summary, highlight=False, soft_wrap=True)
    if args.json is not None:
        write_json(args.json, [kernel.as_dict() for kernel in kernels])


def _launches(args: argparse.Namespace, wanted: Problem) -> list[Launch]:
    if args.tile is None:
        return pass_launches(args.target, wanted, args.pass_)
    step = args.step or "forward"
    if step not in PASSES[args.pass_]:
        raise argparse.ArgumentError(
            None, f"--step must be of the {args.pass_} pass, {PASSES[args.pass_]}, got {step!r}"
        )
    tile = Tile(*args.tile)
    if any(block < 16 or block & (block - 1) for block in tile[:4]) or tile.num_warps & (tile.num_warps - 1):
        raise argparse.ArgumentError(None, f"--tile takes powers of two, blocks and chunks from 16, got {tuple(tile)}")
    launch = Task(args.target, wanted, step).launch(tile)
    if launch is None:
        raise argparse.ArgumentError(None, f"{step} with the tile {tuple(tile)} does not serve {describe(wanted)}")
    return [launch]


# -- tables ------------------------------------------------------------------------------------------------------------


def _table(kernels: list[Kernel]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for k in kernels:
        table.add_column(k.name, justify="right")

    def row(name: str, cells: Iterable[str], end: bool = False) -> None:
        table.add_row(name, *cells, end_section=end)

    def each(name: str, cell: Any, end: bool = False) -> None:
        row(name, map(cell, kernels), end)

    each("grid", lambda k: f"{prod(k.launch.grid)} programs of {k.binary.warps} warps")
    each("registers of a thread", lambda k: str(k.binary.registers))
    each("spills, bytes / accesses", lambda k: f"{k.binary.spill_bytes} / {k.binary.spill_accesses}")
    each("shared memory, bytes", lambda k: str(k.binary.shared))
    each("tensor memory, columns", lambda k: str(k.binary.tensor_columns))
    each("programs at a time", lambda k: f"{k.binary.programs}, limited by {k.limiter}")
    each("offences", lambda k: "; ".join(k.offences) or "none", end=True)
    row("instructions of a warp", ["outside + in loops = run"] * len(kernels))
    counts = [kernel.instructions() for kernel in kernels]
    for unit, what in UNITS.items():
        cells = [f"{out} + {inside} = {run:.0f}" for out, inside, run in (count[unit] for count in counts)]
        row(f"  {unit}: {what}", cells, end=unit == list(UNITS)[-1])
    each("rows of tiles that are pixels", lambda k: f"{k.prediction.work.rows:.0%}")
    each("channels of chunks that exist", lambda k: f"{k.prediction.work.columns:.0%}")
    each("GFLOPs asked for", lambda k: f"{k.prediction.work.flops / 1e9:.2f}")
    each("GFLOPs done by matrix units", lambda k: f"{k.prediction.flops / 1e9:.2f}")
    each("MB at different addresses", lambda k: f"{k.prediction.work.distinct / 1e6:.2f}")
    each("MB asked for", lambda k: f"{k.prediction.work.bytes / 1e6:.2f}")
    each("MB read again, from L2", lambda k: f"{k.prediction.work.reread / 1e6:.2f}", end=True)
    for name in kernels[0].prediction.busy:
        each(f"  us of {name}", lambda k, name=name: f"{1e6 * k.prediction.busy[name]:.1f}")
    each("waves of programs", lambda k: f"{k.prediction.waves}, {k.prediction.at_once} at a time")
    each("PREDICTED us", lambda k: f"{1e6 * k.prediction.seconds:.1f}, bound by {k.prediction.bound}")
    return table


BOUNDS = (  # of H100, bf16: (problem, pass, times the larger of bytes and products)
    (make_problem(64, 256, 512, "local"), "forward", 1.3),
    (make_problem(256, 256, 512), "forward", 1.3),
    (make_problem(64, 256, 512, "local"), "backward", 2.0),
    (make_problem(256, 256, 512), "backward", 2.0),
    *(
        (make_problem(tokens, 32, 32, "local", heads=4, bias=True, maps=64), pass_, bound)
        for pass_, bound in (("forward", 2.0), ("backward", 3.0))
        for tokens in (49, 64)
    ),
)


BOUND_COLUMNS = (
    "predicted for H100", "us", "us of bytes", "us of products", "ratio", "at most", "holds", "kernels bound by",
)  # fmt: skip


def _bounds(verifier: Verifier) -> list[tuple[str, ...]]:
    """A line for each promise: the ratio is to the larger of bytes and products, and should be `at most` so large."""
    lines, gpu = list[tuple[str, ...]](), MACHINES["H100"]
    for wanted, pass_, bound in BOUNDS:
        kernels = [kernel(launch, wanted, gpu, verifier) for launch in pass_launches(gpu.target, wanted, pass_)]
        whole = Whole(wanted, pass_, gpu, kernels)
        microseconds = (f"{1e6 * seconds:.1f}" for seconds in (whole.seconds, whole.bytes_seconds, whole.flops_seconds))
        lines.append((
            f"{pass_}, {describe(wanted)}", *microseconds, f"{whole.ratio:.2f}", f"{bound:.1f}",
            "yes" if whole.ratio <= bound else "no", ", ".join(f"{k.name} {k.prediction.bound}" for k in kernels),
        ))  # fmt: skip
    return lines


def _bounds_table(lines: Iterable[tuple[str, ...]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in BOUND_COLUMNS:
        table.add_column(column, justify="left" if column in (BOUND_COLUMNS[0], BOUND_COLUMNS[-1]) else "right")
    for line in lines:
        table.add_row(*line, style=None if "yes" in line else "red")
    return table
