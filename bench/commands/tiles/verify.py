"""Compile what the run time would launch, read the machine code, fail on what must not ship."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.commands.tiles.common import add_compilers, progress, wide_console, write_json
from bench.tiles.read import LIMITS
from bench.tiles.verify import ARITHMETIC, SHAPES, TARGETS, Verifier, cases, table, verify

HELP = "registers, spills, memory, matrix instructions and access widths of every shipped binary"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, names = parser.add_argument, [shape.name for shape in SHAPES]
    add("--targets", nargs="+", default=list(TARGETS), metavar="TARGET", help="default: " + " ".join(TARGETS))
    add("--shapes", nargs="+", choices=names, default=names, metavar="SHAPE", help="default: all")
    add("--dtypes", nargs="+", choices=ARITHMETIC, default=list(ARITHMETIC), help="default: all")
    add("--dump", type=Path, metavar="DIR", help="write each binary and its disassembly there")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    if unknown := [target for target in args.targets if target not in LIMITS]:
        raise argparse.ArgumentError(None, f"--targets must be among {' '.join(LIMITS)}, got {' '.join(unknown)}")
    console = wide_console()
    found = cases(args.targets, [shape for shape in SHAPES if shape.name in args.shapes], args.dtypes)
    with progress(console) as bar:
        task = bar.add_task("compiling", total=len({case.launch.key for case in found}))
        verdicts = verify(Verifier(args.cache, args.dump), found, args.jobs, lambda: bar.advance(task))
    for target in args.targets:
        console.print(table(target, [verdict for verdict in verdicts if verdict.case.target == target]))
    if args.json is not None:
        write_json(args.json, [verdict.as_dict() for verdict in verdicts])
    wrong = [verdict for verdict in verdicts if verdict.offences]
    for verdict in wrong:
        case = verdict.case
        what = f"{case.target}, {case.shape}, {case.problem.dtype}, {case.launch.name}"
        console.print(f"{what}: {'; '.join(verdict.offences)}", style="red", highlight=False, soft_wrap=True)
    spilling = [v for v in verdicts if v.binary and v.binary.spill_accesses]
    worst = max((v.binary.spill_bytes for v in spilling if v.binary), default=0)
    console.print(
        f"{len(verdicts)} binaries, {len(wrong)} with an offence; {len(spilling)} spill, at most {worst} bytes"
    )
    if wrong:
        sys.exit(1)
