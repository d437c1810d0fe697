"""Search the tiles of a pass: compile, read, predict, and go on to better neighbours until there are none.

Times are PREDICTED from the machine code (bench/tiles/roofline.py) unless --measure times the best on this machine's
GPU. An interrupted search continues where it was.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.progress import Progress, TaskID
from rich.table import Table

from bench.arguments import positive
from bench.commands.tiles.common import (
    add_compilers,
    add_machine,
    add_problem,
    compilers,
    describe,
    machine,
    make_problem,
    problem,
    progress,
    wide_console,
    write_json,
)
from bench.tiles.compile import Problem
from bench.tiles.search import PASSES, Finding, Searcher, Task, choose, write
from bench.tiles.verify import Verifier

HELP = "the tile of every kernel of a pass that is predicted to be fastest, and why"
SHOWN = 5  # tiles of each kernel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_machine(parser)
    add_problem(parser)
    add = parser.add_argument
    add("--shapes", type=Path, metavar="FILE", help="instead of one problem those of a JSON file: a list of objects "
        'like {"pass": "forward", "tokens": 64, "key_width": 256, "value_width": 512}')  # fmt: skip
    add("--write", action="store_true", help="put the choice and its evidence into isa_triton/tiles/TARGET.json")
    add("--measure", type=positive, metavar="N", help="time the N best of each kernel on this machine's GPU")
    add("--json", type=Path, metavar="FILE", help="write all that was tried there")
    add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    gpu, problems, console = machine(args), _problems(args), wide_console()
    if args.measure and not torch.cuda.is_available():
        raise argparse.ArgumentError(None, "--measure needs a GPU on this machine, and torch finds none")
    rows = list[dict[str, Any]]()
    with compilers(args.jobs) as pool, progress(console) as bar:
        for wanted, pass_ in problems:
            console.print(f"{pass_} on {gpu.name} ({gpu.target}): {describe(wanted)}", highlight=False)
            tried = dict[str, list[Finding]]()
            for step in PASSES[pass_]:
                if any(not finding.offences for finding in tried.get("group", [])):
                    break  # one kernel reads every tensor once, where passes would read them again
                line = bar.add_task(step, total=None)
                searcher = Searcher(Verifier(args.cache), pool, gpu, partial(_advance, bar, line))
                tried[step] = searcher.search(Task(args.target, wanted, step), measured=args.measure or 0)
                bar.update(line, total=len(tried[step]), visible=bool(tried[step]))
            chosen = choose(tried)
            for step, findings in tried.items():
                if findings:
                    console.print(_table(step, findings, chosen))
                    rows += [finding.as_dict() for finding in findings]
            total = sum(finding.seconds for finding in chosen)
            how = "measured" if args.measure else "PREDICTED"
            kernels = ", ".join(f"{finding.task.step} {tuple(finding.tile)}" for finding in chosen)
            console.print(f"chosen: {kernels}; {how} {1e6 * total:.1f} us together", highlight=False, soft_wrap=True)
            if args.write:
                console.print(f"wrote {write(chosen)}", highlight=False)
    if args.json is not None:
        write_json(args.json, rows)


def _problems(args: argparse.Namespace) -> list[tuple[Problem, str]]:
    if args.shapes is None:
        return [(problem(args), args.pass_)]
    try:
        entries = json.loads(args.shapes.read_text())
        return [
            (make_problem(**{k: v for k, v in e.items() if k != "pass"}), e.get("pass", "forward")) for e in entries
        ]
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise argparse.ArgumentError(None, f"--shapes {args.shapes} is not a list of problems: {error}") from error


def _advance(bar: Progress, line: TaskID, _: Finding) -> None:
    bar.advance(line)


def _table(step: str, findings: list[Finding], chosen: list[Finding]) -> Table:
    table = Table(title=f"{step}: {len(findings)} tiles tried, the best", title_justify="left", box=box.SIMPLE_HEAD)
    columns = ("queries", "keys", "K chunk", "V chunk", "warps", "stages", "us", "measured", "bound", "regs", "shared",
               "programs", "waves", "offences")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="left" if column in ("bound", "offences") else "right")
    for finding in findings[:SHOWN]:
        binary, prediction = finding.binary, finding.prediction
        facts = [""] * 6 if binary is None or prediction is None else [
            f"{1e6 * prediction.seconds:.1f}", "" if finding.measured is None else f"{1e6 * finding.measured:.1f}",
            prediction.bound, str(binary.registers), f"{binary.shared / 1024:.0f}K", str(binary.programs),
            str(prediction.waves),
        ]  # fmt: skip
        style = "bold" if finding in chosen else "red" if finding.offences else None
        table.add_row(*map(str, finding.tile), *facts, "; ".join(finding.offences), style=style)
    return table
