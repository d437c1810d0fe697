"""Compile what the run time would launch, read the machine code, fail on what must not ship."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from bench import records
from bench.tiles.binaries import LIMITS, Verdict, format_widths
from bench.tiles.compile import DTYPES, Launch, Problem, pass_launches
from bench.tiles.options import WIDTH, add_compilers, compilers, progress, write_json
from isa_triton.partition import Partition

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


SHAPES = {  # attention in networks that people run, on one of their maps
    name: Problem(partition, *widths, heads, bias, name=name)
    for name, partition, widths, heads, bias in (
        ("ISA 64", Partition.local((128, 256), (8, 8)), (256, 512), 1, False),
        ("ISA 128", Partition.interlaced((64, 128), stride=(8, 8)), (256, 512), 1, False),
        ("ISA 256", Partition.interlaced((128, 128), stride=(8, 8)), (256, 512), 1, False),
        ("ISA 512", Partition.interlaced((128, 256), stride=(8, 8)), (256, 512), 1, False),
        ("ISA 1024", Partition.interlaced((256, 256), stride=(8, 8)), (256, 512), 1, False),
        ("heads 64", Partition.local((64, 128), (8, 8)), (64, 64), 8, False),
        ("heads 256", Partition.interlaced((128, 128), stride=(8, 8)), (64, 64), 8, False),
        ("heads 1024", Partition.interlaced((256, 256), stride=(8, 8)), (64, 64), 8, False),
        ("Swin 49", Partition.local((56, 56), (7, 7)), (32, 32), 3, True),
        ("Swin 64", Partition.local((64, 64), (8, 8)), (32, 32), 3, True),
        ("Swin 144", Partition.local((48, 48), (12, 12)), (32, 32), 8, True),
        ("Swin 256", Partition.local((32, 64), (16, 16)), (32, 32), 6, True),
        ("MaxViT 49", Partition.interlaced((56, 56), grid=(7, 7)), (32, 32), 2, True),
        ("MaxViT 64", Partition.interlaced((64, 128), grid=(8, 8)), (32, 32), 2, True),
        ("MaxViT 144", Partition.interlaced((96, 96), grid=(12, 12)), (32, 32), 2, True),
        ("MaxViT 256", Partition.interlaced((64, 128), grid=(16, 16)), (32, 32), 4, True),
        ("HRFormer 49", Partition.local((64, 48), (7, 7)), (39, 39), 2, True),
        ("dense 16384", Partition.dense((128, 128)), (256, 256), 1, False),
    )
}
FP16 = ("ISA 64", "ISA 256", "heads 256", "Swin 49")  # it has bf16's tiles and other matrix instructions: these suffice
COLUMNS = ("shape", "dtype", "kernel", "warps", "regs", "spills", "shared", "tmem", "programs", "matrix", "row loads",
           "row stores", "other loads", "other stores")  # fmt: skip
UNITS = "spills: bytes of stack / accesses; programs: at a time on a multiprocessor; loads, stores: bytes x how many"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, names = parser.add_argument, list(SHAPES)
    add("--targets", nargs="+", default=list(TARGETS), metavar="TARGET", help="default: " + " ".join(TARGETS))
    add("--shapes", nargs="+", choices=names, default=names, metavar="SHAPE", help="default: all")
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    add("--dump", type=Path, metavar="DIR", help="write each binary and its disassembly there")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    if unknown := [target for target in args.targets if target not in LIMITS]:
        raise argparse.ArgumentError(None, f"--targets must be among {' '.join(LIMITS)}, got {' '.join(unknown)}")
    console = records.console(WIDTH)
    shipped = launches(args.targets, [name for name in SHAPES if name in args.shapes], args.dtypes)
    with compilers(args, args.dump) as binaries, progress(console) as bar:
        line = bar.add_task("compiling", total=len({launch.key for launch in shipped}))
        binaries.advance = partial(bar.advance, line)
        verdicts = binaries.verdicts(shipped)
    for target in args.targets:
        shown = [verdict for verdict in verdicts if verdict.launch.target == target]
        styles = ["red" if verdict.offences else None for verdict in shown]
        console.print(records.table(f"{target}   ({UNITS})", COLUMNS, map(_row, shown), words=3, styles=styles))
    if args.json is not None:
        write_json(args.json, [_as_dict(verdict) for verdict in verdicts])
    failed = [verdict for verdict in verdicts if verdict.offences]
    for launch, _, offences in failed:
        what = f"{launch.target}, {launch.problem.name}, {launch.problem.dtype}, {launch.name}"
        console.print(f"{what}: {'; '.join(offences)}", style="red", soft_wrap=True)
    spills = [v.binary.spill_bytes for v in verdicts if v.binary and v.binary.spill_accesses]
    spilled = f"{len(spills)} spill, at most {max(spills, default=0)} bytes"
    console.print(f"{len(verdicts)} binaries, {len(failed)} with an offence; {spilled}")
    if failed:
        sys.exit(1)


def launches(targets: Iterable[str], shapes: Iterable[str] = SHAPES, dtypes: Iterable[str] = DTYPES) -> list[Launch]:
    """Every launch of forward and backward with the tiles that the run time takes, for each target and shape."""
    found = []
    for target, shape, dtype in product(targets, shapes, dtypes):
        if (dtype != "float16" or shape in FP16) and (dtype != "tf32" or target.startswith("sm_")):
            problem = replace(SHAPES[shape], dtype=dtype)
            found += pass_launches(target, problem, "forward", training=True)
            found += pass_launches(target, problem, "backward")
    return found


def _as_dict(verdict: Verdict) -> dict[str, Any]:
    launch, problem, binary = verdict.launch, verdict.launch.problem, verdict.binary
    return {
        "target": launch.target, "shape": problem.name, "tokens": problem.partition.tokens,
        **{name: getattr(problem, name) for name in ("key_width", "value_width", "heads", "bias", "dtype")},
        "kernel": launch.name, "key": launch.key, "grid": launch.grid,
        **({} if binary is None else asdict(binary)),
        "accesses": [] if binary is None else [access._asdict() for access in binary.accesses],
        "offences": verdict.offences,
    }  # fmt: skip


def _row(verdict: Verdict) -> list[object]:
    """What the table says of a binary."""
    launch, binary = verdict.launch, verdict.binary
    names = launch.problem.name, launch.problem.dtype, launch.name.removesuffix("_kernel")
    if binary is None:
        return [*names, None]
    spills = f"{binary.spill_bytes}/{binary.spill_accesses}" if binary.spill_bytes or binary.spill_accesses else 0
    memory = f"{binary.shared / 1024:.0f}K", binary.tensor_columns or None
    matrix = " ".join(f"{kind} x{n}" for kind, n in binary.matrix.items()) or "none"
    kinds = [(store, rows) for rows in (True, False) for store in (False, True)]
    widths = (format_widths(a for a in binary.accesses if (a.store, a.rows) == kind) for kind in kinds)
    return [*names, binary.warps, binary.registers, spills, *memory, binary.programs, matrix, *widths]
