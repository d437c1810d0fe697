"""Rows of workloads: what is counted, what is timed, what an earlier run has already found out."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import measure, records
from bench.arguments import add_passes, add_widths, amount, device, positive
from bench.compared import Provider
from bench.workload import Cost, Level, Pass, Workload
from isa_triton.backend.triton import DEVICES

DTYPES = ("float32", "float16", "bfloat16", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that a survey and its workloads read."""
    add_passes(parser)
    add_widths(parser)
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="float32", help="default: float32")
    add("--device", type=device, default="cpu", help="where seconds are measured (default: cpu); the rest is counted")
    add("--rounds", type=positive, default=5, help="at most so many timed calls of each, interleaved (default: 5)")
    add("--seconds-budget", type=amount, default=0.8, metavar="S", help="no call is repeated after S (default: 0.8)")
    add("--longest-call", type=amount, default=5.0, metavar="S", help="skip calls predicted longer (default: 5)")
    add("--memory-limit", type=amount, default=6.0, metavar="GB", help="skip calls that need more (default: 6)")
    add("--fresh", action="store_true", help="forget the CSV in DIR (default: measure what is not in it)")


def workload(
    args: argparse.Namespace, level: Level, pass_: Pass, size: tuple[int, int], partition_size: tuple[int, int]
) -> Workload:
    """The workload of a map, with the widths and the type of the arguments."""
    widths = args.channels, args.key_channels, args.value_channels
    return Workload(level, pass_, *size, *widths, partition_size, getattr(torch, args.dtype))


def conduct(args: argparse.Namespace, path: Path, plan: Sequence[tuple[Workload, Sequence[Provider]]]) -> list[Cost]:
    """Visits workloads, the small ones first, under a progress bar; keeps the CSV at `path`; returns the plan's rows.

    The CSV is written after every workload, so that an interrupted run keeps what it has, and rows of other workloads
    stay in it.

    Raises:
        argparse.ArgumentError: the file at `path` is something else.
    """
    try:
        survey = Survey(args, () if args.fresh else records.read(path, Cost))
    except ValueError as error:
        raise argparse.ArgumentError(None, f"{error}; --fresh writes it anew") from error
    terminal, columns = records.console(), (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=terminal) as progress:
        task = progress.add_task("", total=sum(len(providers) for _, providers in plan))
        for workload, providers in plan:
            progress.update(task, description=f"{workload.level} {workload.pass_} {records.format_size(workload.size)}")
            survey.visit(workload, providers)
            records.write(path, Cost, survey.rows())
            progress.advance(task, len(providers))
    if remarks := survey.remarks():
        terminal.print("Not there or not timed (-):", *remarks, sep="\n  ")
    terminal.print(f"Wrote {path}")
    return list(survey.found.values())


class Survey:
    """Counts and times workloads, and predicts from each what the next would take.

    Args:
        args: as `add_arguments` made them.
        known: rows of an earlier run. A workload whose rows are all among them is not measured again; times of one
            workload always come from one run, in which all providers were interleaved.
    """

    def __init__(self, args: argparse.Namespace, known: Iterable[Cost] = ()) -> None:
        self.args = args
        self.known = {row.cell: row for row in known}
        self.found: dict[Cost, Cost] = {}  # the rows of this survey, by cell
        self.absent: dict[str, None] = {}  # who has no form of a workload, or cannot run here, and why, said once
        self.skipped: dict[tuple[str, Level, Pass], list[str]] = {}  # on which maps not timed, and why
        self.first_guess = measure.matmul_rate(getattr(torch, args.dtype), args.device)
        self.rates: dict[tuple[str, Level, Pass], float] = {}  # FLOPs per second at the size before

    def visit(self, workload: Workload, providers: Sequence[Provider]) -> None:
        """Adds a row a provider: counted, and timed together where each is predicted to fit."""
        obstacles = {provider: provider.obstacle(workload) for provider in providers}
        self.absent |= {f"{provider.name} {obstacle}": None for provider, obstacle in obstacles.items() if obstacle}
        present = {provider.name: provider for provider, obstacle in obstacles.items() if not obstacle}
        cells = {name: Cost.of(name, workload, self.args.device) for name in present}
        earlier = {name: self.known[cell] for name, cell in cells.items() if cell in self.known}
        counts = {name: (row.flops, row.peak_bytes) for name, row in earlier.items()}
        for name in present.keys() - earlier.keys():
            counts[name] = measure.count(partial(measure.step, present[name], workload))
        fitting = [name for name, provider in present.items() if self.fits(provider, workload, *counts[name])]
        if all(name in earlier and earlier[name].seconds is not None for name in fitting):
            seconds = {name: row.seconds for name, row in earlier.items() if row.seconds is not None}
        else:
            seconds = self.seconds(workload, [present[name] for name in fitting])
        for name, cell in cells.items():
            self.found[cell] = cell.found(counts[name], seconds.get(name))
            if name in seconds:
                self.rates[name, workload.level, workload.pass_] = counts[name][0] / max(seconds[name], 1e-6)

    def rows(self) -> list[Cost]:
        """What this survey found, and below it what the earlier rows say of other workloads."""
        return list((self.found | self.known | self.found).values())  # found first, and found wins

    def seconds(self, workload: Workload, providers: Sequence[Provider]) -> dict[str, float]:
        args, device = self.args, self.args.device
        inputs = workload.inputs(device) if providers else ()
        steps = {provider.name: measure.step(provider, workload, device, inputs) for provider in providers}
        for provider in providers:
            if provider.compiles:
                steps[provider.name]()
        seconds = measure.seconds(steps, rounds=args.rounds, budget=args.seconds_budget, device=device)
        return {name: round(time, 6) for name, time in seconds.items()}

    def fits(self, provider: Provider, workload: Workload, flops: int, peak: int) -> bool:
        """Whether a call runs here and fits in memory and time; keeps the reason where it does not."""
        panel = provider.name, workload.level, workload.pass_
        predicted = flops / self.rates.get(panel, self.first_guess)
        if not provider.runs_on(self.args.device):
            self.absent[f"{provider.name} is counted only: it runs on {' and '.join(DEVICES)} devices"] = None
            return False
        if peak > self.args.memory_limit * 1e9:
            reason = f"would need {peak / 1e9:.1f} GB"
        elif predicted > self.args.longest_call:
            reason = f"would take about {predicted:.0f} s"
        else:
            return True
        self.skipped.setdefault(panel, []).append(f"{records.format_size(workload.size)}: {reason}")
        return False

    def remarks(self) -> list[str]:
        """What a reader of the rows will miss, and why: a line for what is not there, and for what was not timed."""
        lines = list(self.absent)
        for (name, level, pass_), maps in self.skipped.items():
            more = f", and {len(maps) - 1} more" if len(maps) > 1 else ""
            lines.append(f"{name}, {level} {pass_} {maps[0]}{more}")
        return lines
