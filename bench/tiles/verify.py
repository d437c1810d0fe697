"""Compile what the run time would launch, read the machine code, fail on what must not ship."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import records
from bench.tiles.binaries import Verdict, format_widths
from bench.tiles.compile import DTYPES, Launch, Problem, pass_launches
from bench.tiles.options import add_compilers, compilers, progress, wide_console, write_json
from bench.tiles.read import LIMITS
from isa_triton.partition import Partition

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def _interlaced(name: str, size: tuple[int, int], key: int, value: int, heads: int = 1) -> Problem:
    return Problem(Partition.interlaced(size, stride=(8, 8)), key, value, heads, name=name)


def _windows(name: str, size: tuple[int, int], side: int, heads: int, width: int = 32) -> Problem:
    return Problem(Partition.local(size, (side, side)), width, width, heads, bias=True, name=name)


def _grids(name: str, size: tuple[int, int], side: int, heads: int) -> Problem:
    return Problem(Partition.interlaced(size, grid=(side, side)), 32, 32, heads, bias=True, name=name)


SHAPES = {  # attention in networks that people run, on one of their maps
    problem.name: problem
    for problem in (
        Problem(Partition.local((128, 256), (8, 8)), 256, 512, name="ISA 64"),
        _interlaced("ISA 128", (64, 128), 256, 512),
        _interlaced("ISA 256", (128, 128), 256, 512),
        _interlaced("ISA 512", (128, 256), 256, 512),
        _interlaced("ISA 1024", (256, 256), 256, 512),
        Problem(Partition.local((64, 128), (8, 8)), 64, 64, heads=8, name="heads 64"),
        _interlaced("heads 256", (128, 128), 64, 64, heads=8),
        _interlaced("heads 1024", (256, 256), 64, 64, heads=8),
        _windows("Swin 49", (56, 56), 7, heads=3),
        _windows("Swin 64", (64, 64), 8, heads=3),
        _windows("Swin 144", (48, 48), 12, heads=8),
        _windows("Swin 256", (32, 64), 16, heads=6),
        _grids("MaxViT 49", (56, 56), 7, heads=2),
        _grids("MaxViT 64", (64, 128), 8, heads=2),
        _grids("MaxViT 144", (96, 96), 12, heads=2),
        _grids("MaxViT 256", (64, 128), 16, heads=4),
        _windows("HRFormer 49", (64, 48), 7, heads=2, width=39),
        Problem(Partition.dense((128, 128)), 256, 256, name="dense 16384"),
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
    console = wide_console()
    shipped = launches(args.targets, [name for name in SHAPES if name in args.shapes], args.dtypes)
    with compilers(args, args.dump) as binaries, progress(console) as bar:
        line = bar.add_task("compiling", total=len({launch.key for launch in shipped}))
        verdicts = binaries.verdicts(shipped, lambda: bar.advance(line))
    for target in args.targets:
        shown = [verdict for verdict in verdicts if verdict.launch.target == target]
        styles = ["red" if verdict.offences else None for verdict in shown]
        console.print(records.table(f"{target}   ({UNITS})", COLUMNS, map(_row, shown), words=3, styles=styles))
    if args.json is not None:
        write_json(args.json, [_as_dict(verdict) for verdict in verdicts])
    failed = [verdict for verdict in verdicts if verdict.offences]
    for verdict in failed:
        launch, problem = verdict.launch, verdict.launch.problem
        what = f"{launch.target}, {problem.name}, {problem.dtype}, {launch.name}"
        console.print(f"{what}: {'; '.join(verdict.offences)}", style="red", highlight=False, soft_wrap=True)
    spills = [v.binary.spill_bytes for v in verdicts if v.binary and v.binary.spill_accesses]
    console.print(
        f"{len(verdicts)} binaries, {len(failed)} with an offence; {len(spills)} spill, at most "
        f"{max(spills, default=0)} bytes"
    )
    if failed:
        sys.exit(1)


def launches(targets: Iterable[str], shapes: Iterable[str] = SHAPES, dtypes: Iterable[str] = DTYPES) -> list[Launch]:
    """Every launch of forward and backward with the tiles that the run time takes, for each target and shape."""
    found = []
    for target in targets:
        for shape in shapes:
            for dtype in dtypes:
                if (dtype == "float16" and shape not in FP16) or (dtype == "tf32" and not target.startswith("sm_")):
                    continue
                problem = replace(SHAPES[shape], dtype=dtype)
                found += pass_launches(target, problem, "forward", training=True)
                found += pass_launches(target, problem, "backward")
    return found


def _as_dict(verdict: Verdict) -> dict[str, Any]:
    launch, problem, binary = verdict.launch, verdict.launch.problem, verdict.binary
    return {
        "target": launch.target,
        "shape": problem.name,
        "tokens": problem.partition.tokens,
        **{name: getattr(problem, name) for name in ("key_width", "value_width", "heads", "bias", "dtype")},
        "kernel": launch.name,
        "key": launch.key,
        "grid": launch.grid,
        **({} if binary is None else asdict(binary)),
        "accesses": [] if binary is None else [access._asdict() for access in binary.accesses],
        "offences": verdict.offences,
    }


def _row(verdict: Verdict) -> list[object]:
    """What the table says of a binary."""
    launch, binary = verdict.launch, verdict.binary
    names = launch.problem.name, launch.problem.dtype, launch.name.removesuffix("_kernel")
    if binary is None:
        return [*names, None]
    kinds = [(store, rows) for rows in (True, False) for store in (False, True)]
    return [
        *names,
        binary.warps,
        binary.registers,
        f"{binary.spill_bytes}/{binary.spill_accesses}" if binary.spill_bytes or binary.spill_accesses else 0,
        f"{binary.shared / 1024:.0f}K",
        binary.tensor_columns or None,
        binary.programs,
        " ".join(f"{kind} x{n}" for kind, n in binary.matrix.items()) or "none",
        *(format_widths(a for a in binary.accesses if (a.store, a.rows) == kind) for kind in kinds),
    ]
