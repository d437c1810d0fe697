"""``python -m bench check``: both backends against the formula in fp64, and on a GPU how long they take.

Without --cases a few named cases are checked; with it hypothesis draws that many for each backend, and shrinks a wrong
one; check.png shows how much of the budget was used. On the CPU the kernels are interpreted, on small maps and without
bf16, which Triton's interpreter gets wrong.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from bench import measure
from bench.arguments import device, folder, positive
from bench.cases import NAMES, Case, errors, strategy
from bench.records import write_text
from bench.results import plt
from isa_triton import partitioned_attention
from isa_triton.backend.triton import DEVICES

HELP = "both backends against fp64, forward and backward: check.csv, with times on a GPU"
COLUMNS = ("backend", "case", "dtype", "logits", "seed", *NAMES, "forward_ms", "backward_ms")
FLOOR = 1e-4  # of the plot: no error at all is drawn there
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def named_cases(large: bool) -> list[Case]:
    """Every kind of partition, dividing and not, with every feature at least once."""
    half = [torch.float16, torch.bfloat16] if large else [torch.float16]
    even, odd = ((128, 256), (97, 130)) if large else ((8, 12), (9, 11))
    p = (8, 8) if large else (4, 3)
    kinds = ("interlaced", "grid", "local", "rows", "columns")
    found = [
        Case(kind, size, p, (64, 64), heads=2, bias=kind in ("grid", "local"), dtype=dtype)
        for kind in kinds
        for size in (even, odd)
        for dtype in (torch.float32, *half)
    ]
    shift = p[0] // 2, p[1] // 2
    found += [
        Case("local", odd, p, (64, 64), 2, bias=True, dtype=dtype, shift=shift) for dtype in (torch.float32, *half)
    ]
    whole = (48, 72) if large else (7, 13)
    found += [Case("dense", whole, whole, (32, 80), 3, dtype=dtype) for dtype in (torch.float32, *half)]
    found += [Case("local", odd, p, widths, bias=True, dtype=half[0]) for widths in ((39, 39), (24, 1), (1, 24))]
    found += [Case(kind, even, p, (256, 512), dtype=dtype) for kind in kinds[::2] for dtype in (torch.float32, *half)]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--cases", type=positive, metavar="N", help="draw so many for each backend, instead of the named ones")
    add("--seed", type=positive, default=1, help="of what is drawn (default: 1)")
    add("--backends", nargs="+", choices=("triton", "eager"), default=["triton", "eager"], help="default: both")
    add("--device", type=device, default="cpu", help="cpu interprets the kernels (default: cpu)")
    add("--out", type=folder, default="out", metavar="DIR", help="folder of check.csv (default: out)")


def run(args: argparse.Namespace) -> None:
    gpu = torch.device(args.device).type in DEVICES
    if not gpu and os.environ.get("TRITON_INTERPRET") != "1":  # read when kernels are decorated: begin again with it
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "TRITON_INTERPRET": "1"})
    if args.cases is not None and not find_spec("hypothesis"):
        raise argparse.ArgumentError(
            None, "--cases draws with hypothesis, which is not installed (pip install hypothesis)"
        )
    console, sheet = Console(width=max(Console().width, 150)), Sheet(args.device)
    for backend in args.backends:
        if args.cases is None:
            for case in named_cases(large=gpu):
                sheet.check(backend, case)
        else:
            draw(sheet, backend, args.cases, args.seed, console)
    path = args.out / "check.csv"
    write_text(path, sheet.csv())
    if args.cases is not None:
        plot(sheet, args.out / "check.png")
    console.print(sheet.table() if args.cases is None else sheet.worst())
    console.print(f"{len(sheet.rows)} cases, {len(sheet.wrong)} beyond the error budget. Wrote {path}", highlight=False)
    for backend, case in sheet.wrong[-1:]:
        console.print(f"the last of them, on {backend}: {case!r}", style="red", highlight=False)
    if sheet.wrong:
        sys.exit(1)


class Sheet:
    """What was checked, and how it came out: errors as parts of what is allowed."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.rows: list[tuple[str, Case, dict[str, float], tuple[float, ...]]] = []
        self.wrong: list[tuple[str, Case]] = []

    def check(self, backend: str, case: Case) -> bool:
        """Check one case and, on a GPU, time it; returns whether it is right."""
        parts = errors(case, backend, self.device)
        right = all(part <= 1 for part in parts.values())  # NaN is not
        times = seconds(case, backend, self.device) if torch.device(self.device).type in DEVICES else ()
        self.rows.append((backend, case, parts, times))
        if not right:
            self.wrong.append((backend, case))
        return right

    def cells(self) -> Iterable[list[str]]:
        for backend, case, parts, times in self.rows:
            errors_ = [f"{parts[name]:.4f}" if name in parts else "" for name in NAMES]
            ms = [f"{1e3 * t:.4f}" for t in times] or ["", ""]
            yield [backend, str(case), _name(case.dtype), f"{case.logits:g}", str(case.seed), *errors_, *ms]

    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *self.cells()])
        return text.getvalue()

    def table(self) -> Table:
        """A line a case."""
        table = _table(f"errors as parts of what is allowed, {self.device}", COLUMNS)
        wrong = {(backend, str(case)) for backend, case in self.wrong}
        for cells in self.cells():
            table.add_row(*cells, style="red" if (cells[0], cells[1]) in wrong else None)
        return table

    def worst(self) -> Table:
        """The largest error of every backend and dtype."""
        table = _table("largest errors as parts of what is allowed", ("backend", "dtype", "cases", *NAMES))
        for key in dict.fromkeys((backend, case.dtype) for backend, case, *_ in self.rows):
            found = [parts for backend, case, parts, _ in self.rows if (backend, case.dtype) == key]
            largest = [max((parts.get(name, 0.0) for parts in found), default=0.0) for name in NAMES]
            table.add_row(key[0], _name(key[1]), str(len(found)), *(f"{part:.3f}" for part in largest))
        return table


def draw(sheet: Sheet, backend: str, cases: int, first: int, console: Console) -> None:
    """Check `cases` cases that hypothesis draws; after a wrong one it goes on to the smallest that is wrong as well."""
    from hypothesis import HealthCheck, given, seed, settings

    interpreted = backend == "triton" and torch.device(sheet.device).type == "cpu"
    dtypes = DTYPES[:2] if interpreted else DTYPES
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"{backend}, seed {first}", total=cases)

        @seed(first)
        @settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(strategy(dtypes, longest=6 if interpreted else 24))
        def property_(case: Case) -> None:
            right = sheet.check(backend, case)
            progress.advance(task)
            assert right

        try:
            property_()
        except AssertionError:
            if not sheet.wrong:
                raise


def plot(sheet: Sheet, path: Path) -> None:
    """How much of the budget was used: the median of all cases (mark) and the worst (line's end)."""
    groups = list(dict.fromkeys((backend, case.dtype) for backend, case, *_ in sheet.rows))
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for i, key in enumerate(groups):
        for j, name in enumerate(NAMES):
            parts = [p[name] for backend, case, p, _ in sheet.rows if (backend, case.dtype) == key and name in p]
            if not parts:
                continue
            x, low, high = j + (i - len(groups) / 2) * 0.12, median(parts), max(parts)
            label = f"{key[0]}, {_name(key[1])}" if j == 0 else None
            axes.vlines(x, max(low, FLOOR), max(high, FLOOR), colors=f"C{i}", linewidth=2)
            axes.plot(x, max(low, FLOOR), marker="osv^D"[i], color=f"C{i}", markersize=5, linestyle="", label=label)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set(yscale="log", xticks=range(len(NAMES)), ylabel="error / what the budget allows, median to worst",
             title=f"{len(sheet.rows)} random cases against fp64")  # fmt: skip
    axes.set_xticklabels(NAMES)
    axes.legend(fontsize="small", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def seconds(case: Case, backend: str, device: str) -> tuple[float, float]:
    """Median seconds of forward and of backward alone, by device events."""
    inputs = case.inputs(device)
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    bias = inputs["bias"].requires_grad_() if case.bias else None
    out = partitioned_attention(q, k, v, case.partition, bias=bias, backend=backend)
    leaves = [q, k, v, *([] if bias is None else [bias])]

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (partitioned_attention(q, k, v, case.partition, bias=bias, backend=backend),)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, inputs["do"], retain_graph=True)

    medians = measure.seconds({"forward": forward, "backward": backward}, rounds=50, device=device)
    return medians["forward"], medians["backward"]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        words: Any = "left" if column in ("backend", "case", "dtype") else "right"
        table.add_column(column, justify=words, no_wrap=True)
    return table
