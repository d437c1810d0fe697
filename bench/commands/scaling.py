"""``python -m bench scaling``: FLOPs, peak bytes and seconds of every provider across resolutions."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import measure
from bench.providers import PROVIDERS
from bench.results import QUANTITIES, Row, plot, read_rows, summary, write_rows
from bench.workload import LEVELS, PASSES, Level, Pass, Workload
from isa_triton import fused

HELP = "FLOPs, memory and time across resolutions: scaling.csv, flops.png, memory.png, time.png"
SIZES = ((32, 32), (64, 64), (64, 128), (97, 97), (128, 128), (128, 256), (256, 256), (512, 512))
DTYPES = ("float32", "float16", "bfloat16", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of the results (default: out)")
    add("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS), help="who is measured (default: all)")
    add(
        "--sizes",
        nargs="+",
        type=size,
        default=list(SIZES),
        metavar="SIZE",
        help="maps in pixels, 64 or 64x128, height first (default: " + " ".join(f"{h}x{w}" for h, w in SIZES) + ")",
    )
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="default: both")
    add("--level", nargs="+", choices=LEVELS, default=list(LEVELS), help="default: both")
    add("--channels", type=positive, default=512, metavar="C", help="module level: channels in and out (default: 512)")
    add("--key-channels", type=positive, default=256, metavar="K", help="default: 256")
    add("--value-channels", type=positive, default=512, metavar="V", help="default: 512")
    add("--partition-size", type=size, default=(8, 8), metavar="P", help="8 or 8x4, height first (default: 8)")
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--device", type=device, default="cpu", help="where seconds are measured (default: cpu); the rest is counted")
    add("--rounds", type=positive, default=7, help="at most so many timed calls of each, interleaved (default: 7)")
    add(
        "--seconds-budget",
        type=float,
        default=2.0,
        metavar="S",
        help="no call is repeated after S (default: 2)",
    )
    add("--longest-call", type=float, default=8.0, metavar="S", help="skip calls predicted longer (default: 8)")
    add("--memory-limit", type=float, default=6.0, metavar="GB", help="skip calls that need more (default: 6)")


def run(args: argparse.Namespace) -> None:
    p_h, p_w = args.partition_size
    for height, width in args.sizes:
        if p_h > height or p_w > width:
            message = f"--partition-size {p_h}x{p_w} is larger than the map {height}x{width}"
            raise argparse.ArgumentError(None, message)
    console, bar = Console(), (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    path = args.out / "scaling.csv"
    scaling, rows = Scaling(args), list[Row]()
    with Progress(*bar, console=console) as progress:
        task = progress.add_task("", total=len(scaling.workloads) * len(args.providers))
        for workload in scaling.workloads:
            description = f"{workload.level} {workload.pass_} {workload.height}x{workload.width}"
            progress.update(task, description=description)
            rows += scaling.rows(workload)
            write_rows(path, rows)  # after every workload: an interrupted run keeps what it has
            progress.advance(task, len(args.providers))
    plots = [args.out / quantity.file for quantity in QUANTITIES]
    rows = read_rows(path)
    for quantity, picture in zip(QUANTITIES, plots, strict=True):
        plot(rows, quantity, picture, args.partition_size)
    for table in summary(rows):
        console.print(table)
    console.print("Not timed (-):", *scaling.skipped, sep="\n  ", highlight=False)
    console.print("Wrote", *(str(file) for file in (path, *plots)), sep="\n  ", highlight=False)


class Scaling:
    """Measures workloads, small ones first, and predicts from each what the next would take."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.dtype: torch.dtype = getattr(torch, args.dtype)
        sizes = sorted(dict.fromkeys(args.sizes), key=lambda size: size[0] * size[1])
        panels = product(args.level, args.passes)
        self.workloads = [self.workload(level, pass_, *size) for (level, pass_), size in product(panels, sizes)]
        self.first_guess = measure.matmul_rate(self.dtype, args.device)
        self.rates: dict[tuple[str, Level, Pass], float] = {}  # FLOPs per second at the size before
        self.skipped: list[str] = []

    def workload(self, level: Level, pass_: Pass, height: int, width: int) -> Workload:
        args = self.args
        widths = args.channels, args.key_channels, args.value_channels
        return Workload(level, pass_, height, width, *widths, args.partition_size, self.dtype)

    def rows(self, workload: Workload) -> Iterator[Row]:
        """One row a provider: counted, and timed together where each is predicted to fit."""
        providers = [PROVIDERS[name] for name in self.args.providers]
        counts = {p.name: measure.count(partial(measure.step, p, workload)) for p in providers}
        seconds = self.seconds(workload, counts)
        for name, (flops, peak) in counts.items():
            yield Row(
                provider=name,
                level=workload.level,
                pass_=workload.pass_,
                height=workload.height,
                width=workload.width,
                channels=workload.channels,
                key_channels=workload.key_channels,
                value_channels=workload.value_channels,
                dtype=self.args.dtype,
                device=self.args.device,
                flops=flops,
                peak_bytes=peak,
                seconds=round(seconds[name], 6) if name in seconds else None,
                source="counted+measured" if name in seconds else "counted",
            )

    def seconds(self, workload: Workload, counts: dict[str, tuple[int, int]]) -> dict[str, float]:
        args, device = self.args, self.args.device
        fitting = [name for name, counted in counts.items() if self.fits(name, workload, *counted)]
        inputs = workload.inputs(device) if fitting else ()
        steps = {name: measure.step(PROVIDERS[name], workload, device, inputs) for name in fitting}
        seconds = measure.seconds(steps, rounds=args.rounds, budget=args.seconds_budget, device=device)
        for name, time in seconds.items():
            self.rates[name, workload.level, workload.pass_] = counts[name][0] / time
        return seconds

    def fits(self, name: str, workload: Workload, flops: int, peak: int) -> bool:
        """Whether a call fits in memory and time; keeps the reason where it does not."""
        predicted = flops / self.rates.get((name, workload.level, workload.pass_), self.first_guess)
        if not PROVIDERS[name].runs_on(self.args.device):
            reason = f"runs on {' and '.join(fused.DEVICES)} devices"
        elif peak > self.args.memory_limit * 1e9:
            reason = f"would need {peak / 1e9:.1f} GB"
        elif predicted > self.args.longest_call:
            reason = f"would take about {predicted:.0f} s"
        else:
            return True
        where = f"{workload.level} {workload.pass_} {workload.height}x{workload.width}"
        self.skipped.append(f"{name}, {where}: {reason}")
        return False


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def size(text: str) -> tuple[int, int]:
    """(height, width) of "64" or "64x128"."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
        raise argparse.ArgumentTypeError(f"must be a side or HEIGHTxWIDTH in pixels, as 64 or 64x128, got {text!r}")
    return int(sides[0]), int(sides[-1])


def device(text: str) -> str:
    """The name of a device that this machine has."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"must be a device of this machine, got {text!r}: {reason}") from error
    return text
