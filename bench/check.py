"""``python -m bench check``: both backends against the formula in fp64, and on a GPU how long they take.

Without --cases a few named cases are checked, and on a GPU every problem that `python -m bench tiles verify` compiles;
with it hypothesis draws that many for each backend, and shrinks a wrong one; check.png shows how much of the budget was
used. --verbose shows every case. On the CPU the kernels are interpreted, on small maps and without bf16, which Triton's
interpreter gets wrong. On a GPU fp32 is multiplied as tf32 too, and a case that it has no memory for is not checked.
With --device ptx:TARGET kernels are compiled for an NVIDIA GPU that is not there, and their PTX is executed by an
emulator, which watches over memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from bench import devices, figures, measure, records, terminal
from bench.arguments import add_out, positive
from bench.cases import ALL_NAMES, LEAVES, Case, errors, has_tf32, multiplied_as_tf32, strategy
from bench.ptx_machine import command
from bench.terminal import Bar, Table, Terminal
from isa_triton import partitioned_attention
from isa_triton.backend.triton import DEVICES

if TYPE_CHECKING:
    from bench.tiles.compile import Problem

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Row:
    """A line of the CSV: errors as parts of what is allowed, where there are any, and on a GPU times, and how."""

    backend: str
    case: str
    dtype: str
    logits: float
    seed: int
    out: float | None = None
    lse: float | None = None
    dq: float | None = None
    dk: float | None = None
    dv: float | None = None
    dbias: float | None = None
    dscale: float | None = None
    dextra_k: float | None = None
    dextra_v: float | None = None
    forward_ms: float | None = None
    backward_ms: float | None = None
    how: str = ""  # times were found out, as `bench.devices.Timer` says it
    note: str = ""  # why a case was not checked


def named_cases(large: bool, tf32: bool = False) -> list[Case]:
    """Every kind of partition, dividing and not, with every feature at least once; those of fp32 as `tf32` too."""
    dtypes, shift = (DTYPES, (4, 4)) if large else (DTYPES[:2], (2, 1))
    even, odd, whole = ((128, 256), (97, 130), (48, 72)) if large else ((8, 12), (9, 11), (7, 13))
    p = (8, 8) if large else (4, 3)
    kinds = ("interlaced", "grid", "local", "rows", "columns")
    found = [
        Case(kind, size, p, (64, 64), heads=2, bias=kind in ("grid", "local"), dtype=dtype)
        for kind, size, dtype in product(kinds, (even, odd), dtypes)
    ]
    found += [Case("local", odd, p, (64, 64), 2, bias=True, dtype=dtype, shift=shift) for dtype in dtypes]
    found += [Case("dense", whole, whole, (32, 80), 3, dtype=dtype) for dtype in dtypes]
    line, volume = ((4099,), (17, 33, 35)) if large else ((29,), (4, 7, 5))
    found += [Case("interlaced", line, (8,), (24, 40), 3, bias=True, dtype=dtype) for dtype in dtypes]
    found += [Case("interlaced", volume, (2, 3, 4), (16, 48), 3, bias=True, dtype=dtype) for dtype in dtypes]
    seam = Case("local", volume, (2, *p), (64, 64), 2, bias=True, shift=(0, *shift), cyclic=(False, False, True))
    found += [replace(seam, dtype=dtype) for dtype in dtypes]
    found += [Case("local", odd, p, widths, bias=True, dtype=torch.float16) for widths in ((39, 39), (24, 1), (1, 24))]
    found += [Case(kind, even, p, (256, 512), dtype=dtype) for kind, dtype in product(kinds[::2], dtypes)]
    whole_volume = Case("local", volume, (2, 3, 4), (24, 40), heads=6)
    a_line, a_map = replace(whole_volume, size=line, p=(8,)), replace(whole_volume, size=odd, p=p, shift=shift)
    found += [
        replace(case, dtype=dtype)
        for dtype in dtypes
        for case in (
            replace(a_map, bias=True, per_map=True, forbids=True, table_dtype=torch.float32),
            replace(a_line, bias=True, one_head=True, scales=True, share=3),
            replace(a_map, bias=True, cosine=True, share=2),
            replace(a_line, extra=2, weights="keys", valid=True, scales=True, cosine=True),
            replace(whole_volume, bias=True, per_map=True, one_head=True, valid=True, share=2),
            replace(a_map, extra=2, weights="keys", scales=True, dropout=0.5, table_dtype=torch.float32),
            replace(whole_volume, extra=3, weights="maps", valid=True, shift=(1, 1, 2), cyclic=(True, False, True)),
            replace(whole_volume, dropout=0.2, shift=(1, 1, 2), cyclic=(True, False, True)),
            replace(a_line, extra=1, weights="pixels", valid=True, bias=True, forbids=True, share=2, scales=True),
        )
    ]
    sizes = ((40, 61), (5, 70), (1, 3)) if large else ((5, 6), (1, 3), (7, 2))
    found += [
        replace(case, dtype=dtype)
        for dtype in dtypes
        for case in (
            Case("local", (4099,) if large else (60,), p, (24, 40), 3, bias=True, maps=1, shift=shift, packed=sizes),
            Case("grid", (4099,) if large else (60,), p, (64, 64), 3, valid=True, maps=1, packed=sizes, on_device=True),
        )
    ]
    return found + [replace(case, tf32=True) for case in found if tf32 and case.dtype == torch.float32]


def shipped_cases(tf32: bool) -> Iterator[Case]:
    """Every problem that `tiles verify` compiles, in every dtype that has binaries of its own."""
    from bench.tiles.verify import problems_of  # compiling is for GPUs alone

    return map(case_of, problems_of(tf32))


def case_of(problem: Problem) -> Case:
    """A problem of the workbench as the check says it."""
    from bench.tiles.compile import DTYPES as stored

    kind = problem.kind
    p = tuple(axis.token_stride if kind == "interlaced" else axis.tokens for axis in problem.partition)
    widths, features = (problem.key_width, problem.value_width), (problem.heads, problem.bias)
    case = Case(kind, problem.partition.size, p, widths, *features, stored[problem.dtype], problem.maps)
    return replace(case, tf32=problem.dtype == "tf32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cases", type=positive, metavar="N", help="draw so many for each backend (default: the named ones)")
    add("--seed", type=positive, default=1, metavar="N", help="of what is drawn")
    add("--backends", nargs="+", choices=("triton", "eager"), default=["triton", "eager"], help="which are checked")
    command.add_arguments(parser)  # --device
    add_out(parser, "check.csv")
    terminal.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if command.is_for(args):
        if command.run(args):
            sys.exit(1)
        return
    gpu = torch.device(args.device).type in DEVICES
    if not gpu and os.environ.get("TRITON_INTERPRET") != "1":  # read when kernels are decorated: begin again with it
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "TRITON_INTERPRET": "1"})
    if args.cases is not None and not find_spec("hypothesis"):
        missing = "--cases draws with hypothesis, which is not installed (pip install hypothesis)"
        raise argparse.ArgumentError(None, missing)
    said, sheet, path = Terminal(args), Sheet(args.device), args.out / "check.csv"
    tf32 = has_tf32(args.device)
    named = [*named_cases(gpu, tf32), *(shipped_cases(tf32) if gpu else ())]
    said.say(f"Every case is a row of {path}")
    written = [path] if args.cases is None else [path, args.out / "check.png"]
    with said.progress("cases", len(args.backends) * (args.cases or len(named))) as bar:
        for backend in args.backends:
            bar.now(backend)
            if args.cases is None:
                for case in named:
                    sheet.check(backend, case)
                    bar.advance()
            else:
                draw(sheet, backend, args.cases, args.seed, bar)
    records.write(path, Row, sheet.rows)
    if args.cases is not None:
        figures.error_budget(sheet.rows, ALL_NAMES, written[1])
    said.show(sheet.table() if args.verbose else sheet.worst())
    noted = [row for row in sheet.rows if row.note]
    said.say(*(f"{row.backend}, {row.dtype}, {row.case}: {row.note}" for row in noted))
    if clocks := devices.clocks(args.device):
        said.say(f"Clocks behind the last case: {clocks}")
    few = f", {len(noted)} not checked or timed" if noted else ""
    said.end(f"{len(sheet.rows)} cases, {len(sheet.wrong)} beyond the error budget{few}.", *written)
    for row, case in sheet.wrong[-1:]:
        said.say(f"The last of them, on {row.backend}: {case!r}", style="red")
    if sheet.wrong:
        sys.exit(1)


class Sheet:
    """What was checked, and how it came out."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.rows: list[Row] = []
        self.wrong: list[tuple[Row, Case]] = []

    def check(self, backend: str, case: Case) -> bool:
        """Check one case and, on a GPU, time it; returns whether it is right, as what does not fit there may be."""
        parts, right = dict[str, float](), True
        found: dict[str, Any] = {}
        try:
            parts = errors(case, backend, self.device)
            right = all(part <= 1 for part in parts.values())  # NaN is not
            found = {name: round(part, 4) for name, part in parts.items()}
            if parts and torch.device(self.device).type in DEVICES:
                found |= timed(case, backend, self.device)
        except Exception as error:  # what a kernel cannot do is found out here
            found["note"] = f"{'not timed' if parts else 'not checked'}: {measure.in_a_line(error)}"
            right = right and isinstance(error, torch.OutOfMemoryError)
        if "note" in found:
            devices.release(self.device)
        self.rows.append(Row(backend, str(case), case.arithmetic, case.logits, case.seed, **found))
        if not right:
            self.wrong.append((self.rows[-1], case))
        return right

    def table(self) -> Table:
        """A line a case."""
        title, cells = f"Errors as parts of what is allowed, {self.device}", list(map(astuple, self.rows))
        wrong = {row for row, _ in self.wrong}
        styles = ["red" if row in wrong else None for row in self.rows]
        return Table(title, records.columns(Row), cells, words=3, styles=styles)

    def worst(self) -> Table:
        """The largest error of every backend and dtype."""
        lines = []
        for key in dict.fromkeys((row.backend, row.dtype) for row in self.rows):
            rows = [row for row in self.rows if (row.backend, row.dtype) == key]
            largest = [max(getattr(row, name) or 0.0 for row in rows) for name in ALL_NAMES]
            lines.append([*key, len(rows), *(f"{part:.3f}" for part in largest)])
        title = f"Largest errors as parts of what is allowed, {self.device}"
        return Table(title, ("backend", "dtype", "cases", *ALL_NAMES), lines, words=2)


def draw(sheet: Sheet, backend: str, cases: int, first: int, bar: Bar) -> None:
    """Check `cases` cases that hypothesis draws; after a wrong one it goes on to the smallest that is wrong as well."""
    from hypothesis import HealthCheck, given, seed, settings

    cpu = torch.device(sheet.device).type == "cpu"
    interpreted = backend == "triton" and cpu
    dtypes = DTYPES[:2] if interpreted else DTYPES
    cases_ = strategy(dtypes, 6 if interpreted else 24, compiled=not cpu, tf32=has_tf32(sheet.device))

    @seed(first)
    @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases_)
    def property_(case: Case) -> None:
        right = sheet.check(backend, case)
        bar.advance()
        assert right

    try:
        property_()
    except AssertionError:
        if not sheet.wrong:
            raise


def timed(case: Case, backend: str, device: str) -> dict[str, Any]:
    """Median milliseconds of forward and of backward alone, and how they were found out, by columns."""
    inputs = case.inputs(device)
    leaves = [inputs[name].requires_grad_() for name in LEAVES if name in inputs]
    attend = partial(partitioned_attention, **case.arguments(inputs), backend=backend)
    with multiplied_as_tf32(case.tf32):
        with devices.stream(device):
            out = attend()
        backward = partial(torch.autograd.grad, out, leaves, inputs["do"], retain_graph=True)
        steps: dict[str, measure.Step] = {"forward_ms": measure.forward(attend), "backward_ms": backward}
        samples = measure.samples(steps, rounds=50, device=device)
    medians = {name: round(1e3 * statistics.median(seconds), 4) for name, (seconds, _) in samples.items()}
    return medians | {"how": " and ".join(dict.fromkeys(how for _, how in samples.values()))}
