"""``python -m bench check --device ptx:TARGET``: compiled PTX executed and race-checked in an emulator; no GPU runs it.

Kernels are compiled for the target and executed by `bench.ptx_machine`, in processes of their own. What is right is not
executed again while neither the kernels nor the machine nor Triton change.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bench import arguments, records
from bench.arguments import from_zero, positive
from bench.cases import NAMES
from bench.ptx_machine.problems import TARGETS, Work, cases, shipped
from bench.ptx_machine.results import MutantRow, Row, Summary, made_by
from bench.terminal import Table, Terminal

PREFIX = "ptx:"


def device(text: str) -> str:
    """The name of a device that this machine has, or "ptx:" and a target."""
    if not text.startswith(PREFIX):
        return arguments.device(text)
    if text.removeprefix(PREFIX) not in TARGETS:
        known = ", ".join(PREFIX + target for target in TARGETS)
        raise argparse.ArgumentTypeError(f"must be one of {known}, got {text!r}")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `check` with such a device alone."""
    group = parser.add_argument_group("compiled kernels, executed by an emulator (--device ptx:TARGET)")
    group.add_argument("--device", type=device, default="cpu",
                       help=f"of the tensors; cpu interprets the kernels, ptx:TARGET ({' '.join(TARGETS)}) "
                       "compiles them and executes their PTX (default: cpu)")  # fmt: skip
    group.add_argument("--shipped", action="store_true", help="every shipped tile, on one group of its size")
    group.add_argument("--first", type=positive, metavar="N", help="the first N checks alone (default: all)")
    group.add_argument("--mutants", type=from_zero, default=0, metavar="N",
                       help="also N kernels with a line changed: which are noticed (default: 0)")  # fmt: skip
    group.add_argument(
        "--jobs", type=positive, default=os.cpu_count(), metavar="N", help="processes (default: one a core)"
    )


def is_for(args: argparse.Namespace) -> bool:
    """Whether the device is a target; else what is for targets alone must not be said."""
    if args.device.startswith(PREFIX):
        if args.cases is not None or args.backends != ["triton", "eager"]:
            raise argparse.ArgumentError(None, f"--cases and --backends are not for --device {args.device}")
        return True
    if args.shipped or args.mutants or args.first:
        raise argparse.ArgumentError(
            None, f"--shipped, --first and --mutants need --device ptx:TARGET, got {args.device}"
        )
    return False


def run(args: argparse.Namespace) -> bool:
    """Whether something is wrong."""
    said, target = Terminal(args), args.device.removeprefix(PREFIX)
    path = args.out / f"ptx_{target}{'_shipped' * args.shipped}.csv"
    works = (shipped(target) if args.shipped else cases(target))[: args.first]
    said.say(f"Compiled PTX executed and race-checked in an emulator; no GPU runs it. Every check is a row of {path}")
    try:
        before = records.read(path, Row)
    except ValueError as error:
        raise argparse.ArgumentError(None, str(error)) from error
    known = {_key(row): row for row in before if row.made_by == made_by() and row.is_right}
    rows = {_key(work): known[_key(work)] for work in works if _key(work) in known}
    if rows:
        said.say(f"{len(rows)} of {len(works)} checks were made before.")
    with said.progress("checks", len(works) - len(rows)) as bar:
        for row in _each("check", [(work,) for work in works if _key(work) not in rows], args.jobs):
            rows[_key(row)] = row
            records.write(path, Row, rows.values())
            bar.advance()
    records.write(path, Row, rows.values())
    found = [rows[_key(work)] for work in works]
    said.show(_table(found, said.verbose, args.device))
    wrong = [row for row in found if not row.is_right]
    for row in wrong:
        said.say(f"{row.case}, {row.arithmetic}: {row.fault or f'{row.worst:.3g} of the budget'}", style="red")
    mutants = _mutants(args, said, works, path) if args.mutants and not wrong else []
    summary = [] if args.first else [_summarise(args.out / "ptx.csv", target, works, found)]
    said.end(" ".join([_sentence(found, works), *mutants[:1]]), path, *mutants[1:], *summary)
    return bool(wrong)


def _summarise(path: Path, target: str, works: list[Work], rows: list[Row]) -> Path:
    """Put the line of a target and this Triton in the place of an older one."""
    tiles = len({entry for work in works for entry in work.entries})
    new = Summary.of_rows(target, "shipped tiles" if tiles else "cases", tiles, rows)
    try:
        known = {each.key: each for each in records.read(path, Summary)}
    except ValueError as error:
        raise argparse.ArgumentError(None, str(error)) from error
    records.write(path, Summary, sorted((known | {new.key: new}).values(), key=lambda each: each.order))
    return path


def _key(of: Work | Row) -> tuple[str, ...]:
    return (of.name if isinstance(of, Work) else of.case), of.arithmetic, of.tiles


def _each(name: str, given: list[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    """Results of a function of `work`, as they come, from processes in which kernels are compiled."""
    with patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)  # read when kernels are decorated
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            for future in as_completed([pool.submit(_call, name, *each) for each in given]):
                yield future.result()


def _call(name: str, *given: Any) -> Any:
    """In a process of its own: what loads kernels is loaded there alone."""
    from bench.ptx_machine import check, mutants

    functions: dict[str, Callable[..., Any]] = {"check": check.check, "mutants": mutants.run}
    return functions[name](*given)


def _table(rows: list[Row], verbose: bool, device: str) -> Table:
    """The largest error of every arithmetic, or every row."""
    title = f"Errors as parts of what is allowed, {device}"
    if verbose:
        styles = [None if row.is_right else "red" for row in rows]
        return Table(title, records.columns(Row), list(map(astuple, rows)), words=4, styles=styles)
    lines = []
    for arithmetic in dict.fromkeys(row.arithmetic for row in rows):
        some = [row for row in rows if row.arithmetic == arithmetic]
        largest = [max(getattr(row, name) or 0.0 for row in some) for name in NAMES]
        instructions = sum(row.instructions for row in some)
        lines.append([arithmetic, len(some), *(f"{part:.3f}" for part in largest), instructions])
    return Table(title, ("arithmetic", "checks", *NAMES, "instructions"), lines)


def _sentence(rows: list[Row], works: list[Work]) -> str:
    beyond, faults = sum(not row.fault and not row.is_right for row in rows), sum(bool(row.fault) for row in rows)
    tiles = {entry for work in works for entry in work.entries}
    kernels = {kernel for row in rows for kernel in row.kernels.split()}
    of = f"{len(tiles)} shipped tiles in {len(rows)} checks" if tiles else f"{len(rows)} cases"
    launches, instructions = sum(row.launches for row in rows), sum(row.instructions for row in rows)
    counted = f"{launches} launches of {len(kernels)} kernels, {instructions} instructions"
    notes = Counter(
        note for row in rows for note in {part.partition(": ")[2] for part in row.notes.split("; ")} if note
    )
    said = "".join(f" {count} have {note}." for note, count in notes.items())
    return f"{of}, {beyond} beyond the error budget. {counted}, {f'{faults} faults' if faults else 'no fault'}.{said}"


def _mutants(args: argparse.Namespace, said: Terminal, works: list[Work], path: Path) -> list[Any]:
    """A sentence about mutants, and where they are written down."""
    file, rows = path.with_name(f"{path.stem}_mutants.csv"), list[MutantRow]()
    shares = [args.mutants // len(works) + (i < args.mutants % len(works)) for i in range(len(works))]
    given = [(work, share, args.seed) for work, share in zip(works, shares, strict=True) if share]
    with said.progress("checks", len(given)) as bar:
        for some in _each("mutants", given, args.jobs):
            rows += some
            bar.advance()
    rows.sort(key=lambda row: (row.change, row.case, row.arithmetic, row.line))
    records.write(file, MutantRow, rows)
    caught, all_ = Counter(row.change for row in rows if not row.survived), Counter(row.change for row in rows)
    said.show(
        Table(
            f"Mutants, seed {args.seed}",
            ("change", "mutants", "noticed"),
            [[name, n, caught[name]] for name, n in all_.items()],
        )
    )
    for row in rows:
        if row.survived:
            said.say(
                f"Not noticed: {row.change}: {row.kernel}, {row.arithmetic}, {row.case}: {row.before} -> "
                f"{row.after or 'nothing'}"
            )
    return [f"{len(rows)} mutants, {sum(caught.values())} noticed.", file]
