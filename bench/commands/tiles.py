"""``python -m bench tiles verify``: compile the shipped kernels without a GPU, and read what the machine code says."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.commands.scaling import positive
from bench.tiles.read import LIMITS
from bench.tiles.verify import ARITHMETIC, SHAPES, TARGETS, Verifier, cases, table, verify

HELP = "the workbench of the kernels: verify compiles them for any target without a GPU"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")
    add = tools.add_parser(
        "verify",
        help="registers, spills, memory, matrix instructions and access widths of every shipped binary",
        description="Compile what the run time would launch, read the machine code, fail on what must not ship.",
    ).add_argument
    names = [shape.name for shape in SHAPES]
    add("--targets", nargs="+", default=list(TARGETS), metavar="TARGET", help="default: " + " ".join(TARGETS))
    add("--shapes", nargs="+", choices=names, default=names, metavar="SHAPE", help="default: all")
    add("--dtypes", nargs="+", choices=ARITHMETIC, default=list(ARITHMETIC), help="default: all")
    add("--dump", type=Path, metavar="DIR", help="write each binary and its disassembly there")
    add("--json", type=Path, metavar="FILE", help="write all figures there")
    add("--jobs", type=positive, default=os.cpu_count(), help="compilers at a time (default: one a core)")
    add("--cache", type=Path, default=default_cache(), metavar="DIR", help=f"default: {default_cache()}")


def default_cache() -> Path:
    """Where compiled kernels and their figures are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isa_triton"


def run(args: argparse.Namespace) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise argparse.ArgumentError(None, "tiles compiles kernels, but TRITON_INTERPRET=1 interprets them: unset it")
    if unknown := [target for target in args.targets if target not in LIMITS]:
        raise argparse.ArgumentError(None, f"--targets must be among {' '.join(LIMITS)}, got {' '.join(unknown)}")
    console = Console(width=max(Console().width, 170))  # a line a binary, also where no terminal is
    bar = TextColumn("compiling"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    found = cases(args.targets, [shape for shape in SHAPES if shape.name in args.shapes], args.dtypes)
    with Progress(*bar, console=console) as progress:
        task = progress.add_task("", total=len({case.launch.key for case in found}))
        verdicts = verify(Verifier(args.cache, args.dump), found, args.jobs, lambda: progress.advance(task))
    for target in args.targets:
        console.print(table(target, [verdict for verdict in verdicts if verdict.case.target == target]))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps([verdict.as_dict() for verdict in verdicts], indent=1) + "\n")
    wrong = [verdict for verdict in verdicts if verdict.offences]
    for verdict in wrong:
        case = verdict.case
        what = f"{case.target}, {case.shape}, {case.problem.dtype}, {case.launch.name}"
        console.print(f"{what}: {'; '.join(verdict.offences)}", style="red", highlight=False, soft_wrap=True)
    spilling = [v for v in verdicts if v.binary and v.binary.spill_bytes]
    worst = max((v.binary.spill_bytes for v in spilling if v.binary), default=0)
    console.print(
        f"{len(verdicts)} binaries, {len(wrong)} with an offence; {len(spilling)} spill, at most {worst} bytes"
    )
    if wrong:
        sys.exit(1)
