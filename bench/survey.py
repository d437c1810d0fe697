"""Rows of workloads: what is counted, what is timed, what an earlier run has already found out.

A disturbed sample is no figure: a row whose samples differ, that has one sample, or that takes longer than more work
does is doubtful, measured again a few times, by a later run too, and marked where it stays so.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import devices, measure, records, terminal
from bench.arguments import add_budget, add_device, add_dtype, add_passes, add_redraw, add_rounds, add_widths, amount
from bench.compared import Provider
from bench.terminal import Terminal
from bench.workload import Cost, Level, Pass, Workload
from isa_triton.backend.triton import DEVICES

DTYPES = ("float32", "float16", "bfloat16", "float64")
SPREAD = 0.25  # of samples, and of the times of two maps: more is a disturbance
AGAIN = 2  # times a run goes back to what is doubtful
CPU_MEMORY = 6.0  # GB that calls may take of a machine that does other things too
Plan = Sequence[tuple[Workload, Sequence[Provider]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that a survey and its workloads read."""
    add_passes(parser)
    add_widths(parser)
    add_dtype(parser, DTYPES)
    add_device(parser, "where seconds are measured; the rest is counted")
    add_rounds(parser, 5)
    add_budget(parser, 0.8)
    add = parser.add_argument
    add("--longest-call", type=amount, default=5.0, metavar="S", help="calls predicted longer are not made")
    limit = f"calls that need more are not made (default: {CPU_MEMORY:g} on a CPU, of a GPU all that it has)"
    add("--memory-limit", type=amount, metavar="GB", help=limit)
    add("--fresh", action="store_true", help="forget the CSV in DIR (default: measure what it lacks or doubts)")
    add_redraw(parser)
    terminal.add_arguments(parser)


def workload(
    args: argparse.Namespace, level: Level, pass_: Pass, size: Sequence[int], partition_size: tuple[int, ...]
) -> Workload:
    """The workload of a map, with the widths and the type of the arguments."""
    widths = args.channels, args.key_channels, args.value_channels
    *depth, height, width = size
    sides = {"depth": depth[0]} if depth else {}
    return Workload(level, pass_, height, width, *widths, partition_size, getattr(torch, args.dtype), **sides)


def conduct(args: argparse.Namespace, said: Terminal, path: Path, plan: Plan) -> list[Cost]:
    """Visits workloads, the small ones first, and again what is doubtful; keeps the CSV; returns the plan's rows.

    The CSV is written after every workload, so that an interrupted run keeps what it has, and rows of other workloads
    stay in it. Rows found under other conditions (host, threads, versions) are found anew; to draw, `--redraw`, any do.

    Raises:
        argparse.ArgumentError: the file at `path` is something else, or has nothing to redraw.
    """
    try:
        earlier = [] if args.fresh else records.read(path, Cost)
    except ValueError as error:
        raise argparse.ArgumentError(None, f"{error}; --fresh writes it anew") from error
    if args.redraw:
        cells = {
            Cost.of(provider.name, workload, args.device) for workload, providers in plan for provider in providers
        }
        if not (rows := [row for row in earlier if row.cell in cells]):
            raise argparse.ArgumentError(None, f"--redraw: {path} has no row of these workloads")
        return rows
    survey = Survey(args, earlier)
    said.say(f"On {survey.conditions['host']} (threads: {survey.conditions['threads']}); every row goes to {path}")
    for _ in range(1 + AGAIN):
        with said.progress("rows", total=sum(len(providers) for _, providers in plan)) as bar:
            for workload, providers in plan:
                bar.now(f"{workload.level} {workload.pass_} {records.format_size(workload.size)}")
                survey.visit(workload, providers)
                records.write(path, Cost, survey.rows())
                bar.advance(len(providers))
        survey.judge()
        records.write(path, Cost, survey.rows())
        if not any(row.doubtful for row in survey.found.values()):
            break
    said.detail(*survey.remarks())
    return list(survey.found.values())


class Survey:
    """Counts and times workloads, and predicts from each what the next would take.

    Args:
        args: as `add_arguments` made them.
        known: rows of an earlier run. What they say under the same conditions without doubt is not measured again;
            where a workload has new rows, all are timed, so that times of one workload come from interleaved calls.
    """

    def __init__(self, args: argparse.Namespace, known: Iterable[Cost] = ()) -> None:
        self.args = args
        self.known = {row.cell: row for row in known}
        self.found: dict[Cost, Cost] = {}  # the rows of this survey, by cell
        self.samples: dict[Cost, list[float]] = {}  # that this survey took, by cell
        self.absent: dict[str, None] = {}  # who has no form of a workload and why, said once
        self.conditions = measure.conditions(args.device)
        whole = CPU_MEMORY if torch.device(args.device).type == "cpu" else devices.memory(args.device) / 1e9
        self.memory_limit = 1e9 * (whole if args.memory_limit is None else args.memory_limit)
        self.first_guess = measure.matmul_rate(getattr(torch, args.dtype), args.device)

    def visit(self, workload: Workload, providers: Sequence[Provider]) -> None:
        """Adds a row a provider: counted, and timed together where each is predicted to fit; doubtful rows again."""
        obstacles = {provider: provider.obstacle(workload) for provider in providers}
        self.absent |= {f"{provider.name} {obstacle}": None for provider, obstacle in obstacles.items() if obstacle}
        present = {provider.name: provider for provider, obstacle in obstacles.items() if not obstacle}
        rows = {name: self.counted(provider, workload) for name, provider in present.items()}
        untimed = [name for name, row in rows.items() if row.seconds is None and row.samples is None]  # nor has failed
        for name in untimed:
            rows[name] = replace(rows[name], note=self.too_much(present[name], rows[name]))
        if any(not rows[name].note for name in untimed):
            timed = [name for name, row in rows.items() if row.seconds is not None or not row.note]
        else:
            timed = [name for name, row in rows.items() if row.doubtful]
        if timed:
            rows |= self.timed(workload, {name: rows[name] for name in timed}, present)
        self.found |= {row.cell: row for row in rows.values()}

    def rows(self) -> list[Cost]:
        """What this survey found, and below it what the earlier rows say of other workloads.

        What was timed under other conditions stays where nothing was timed under these.
        """
        timed = {cell for cell, row in self.known.items() if row.seconds is not None}
        new = {cell: row for cell, row in self.found.items() if row.seconds is not None or cell not in timed}
        return list((self.found | self.known | new).values())

    def counted(self, provider: Provider, workload: Workload) -> Cost:
        """What is known under these conditions, or else what counting says."""
        cell = Cost.of(provider.name, workload, self.args.device)
        here = replace(cell, **self.conditions)
        known = self.found.get(cell) or self.known.get(cell)
        if known and known.conditions == here.conditions:
            return known
        device = self.args.device if provider.runs_on(self.args.device) else "cpu"
        try:
            flops, peak_bytes = measure.count(partial(measure.step, provider, workload, device))
        except Exception as error:  # anyone's code runs here
            return replace(here, samples=0, note=f"not counted: {measure.in_a_line(error)}")
        return replace(here, flops=flops, peak_bytes=peak_bytes)

    def timed(self, workload: Workload, rows: dict[str, Cost], providers: dict[str, Provider]) -> dict[str, Cost]:
        """The rows with the seconds of all samples that this survey took of them, or with what a call raised."""
        args, device, failures = self.args, self.args.device, dict[str, str]()
        inputs, steps = tuple[Tensor, ...](), dict[str, measure.Step]()
        if any(providers[name].compiled for name in rows):
            torch.compiler.reset()  # compilers give up what they have compiled for many sizes already
        for name, row in rows.items():
            try:
                if torch.device(device).type != "cpu":
                    rows[name] = replace(row, allocated_bytes=self.allocated(providers[name], workload))
                inputs = inputs or workload.inputs(device)
                step = measure.step(providers[name], workload, device, inputs)
                if providers[name].compiles:
                    step()
                steps[name] = step
            except Exception as error:  # anyone's code runs here
                failures[name] = measure.in_a_line(error)
            devices.release(device)
        options = {"rounds": args.rounds, "budget": args.budget, "device": device}
        found = measure.samples(steps, failures=failures, **options)
        clocks = devices.clocks(device)
        for name, (times, how) in found.items():
            all_times = self.samples.setdefault(rows[name].cell, [])
            all_times += times
            seconds, spread = round(statistics.median(all_times), 9), round(measure.spread(all_times), 3)
            said: dict[str, Any] = {"seconds": seconds, "spread": spread, "samples": len(all_times), "note": ""}
            rows[name] = replace(rows[name], **said, how=how, clocks=clocks, **self.conditions)
        for name, reason in failures.items():
            rows[name] = replace(rows[name], seconds=None, spread=None, samples=0, note=reason)
        return rows

    def allocated(self, provider: Provider, workload: Workload) -> int:
        """Bytes that one call allocates at once, with all that is made for it: what `measure.count` counts."""
        device = self.args.device
        return devices.peak_bytes(device, lambda: measure.step(provider, workload, device)())

    def too_much(self, provider: Provider, row: Cost) -> str:
        """Why a call is not made here: who cannot run, or more memory or time than allowed; nothing if it is."""
        rates = (
            each.flops / max(each.seconds, 1e-6) for each in self.alike(row) if each.seconds and not _differs(each)
        )
        # the fastest so far: a disturbed sample makes a provider slow, and would rule out what is not
        predicted = row.flops / max(rates, default=self.first_guess)
        if not provider.runs_on(self.args.device):
            return f"counted only: runs on {' and '.join(DEVICES)} devices"
        if row.peak_bytes > self.memory_limit:
            return f"would need {row.peak_bytes / 1e9:.1f} GB"
        return f"would take about {predicted:.0f} s" if predicted > self.args.longest_call else ""

    def alike(self, row: Cost) -> Iterator[Cost]:
        """What is known under these conditions of the same provider, level and pass."""
        rows = (self.known | self.found).values()
        wanted = row.provider, row.panel, row.conditions
        return (each for each in rows if (each.provider, each.panel, each.conditions) == wanted)

    def judge(self) -> None:
        """Notes in every timed row why it is doubtful, if so."""
        timed = {cell: row for cell, row in self.found.items() if row.seconds is not None}
        self.found |= {cell: replace(row, note=self.doubt(row)) for cell, row in timed.items()}

    def doubt(self, row: Cost) -> str:
        """Why the seconds of a row are doubtful, or nothing."""
        if _differs(row):
            return f"the median of the samples is {row.spread:.0%} above the fastest"
        if row.samples == 1:
            return "one sample"
        for more in self.alike(row):
            same_partition, more_work = more.partition_size == row.partition_size, more.flops > row.flops
            if same_partition and more_work and more.seconds and more.seconds * (1 + SPREAD) < (row.seconds or 0):
                return f"slower than {records.format_size(more.size)}, which is more work"
        return ""

    def remarks(self) -> list[str]:
        """What a reader of the rows will miss or doubt, and why: a line for what is not there, and one a row."""
        noted = (row for row in self.found.values() if row.note)
        return [
            *self.absent,
            *(f"{row.provider}, {row.level} {row.pass_} {records.format_size(row.size)}: {row.note}" for row in noted),
        ]


def _differs(row: Cost) -> bool:
    return (row.spread or 0) > SPREAD


def tally(rows: Sequence[Cost]) -> str:
    """How many rows there are, timed and doubtful, and what a device says of itself, in sentences."""
    timed, doubtful = (sum(each) for each in ((r.seconds is not None for r in rows), (r.doubtful for r in rows)))
    why = "" if timed == len(rows) and not doubtful else "; --verbose says why"
    return " ".join([f"{len(rows)} rows, {timed} timed, {doubtful} of these doubtful{why}.", *_on_device(rows)])


def _on_device(rows: Sequence[Cost]) -> Iterator[str]:
    """How a device's times were found out, at which clocks, and what was allocated there beside what was counted."""
    if how := devices.account((row.how for row in rows), (row.clocks for row in rows)):
        yield how
    parts = [row.allocated_bytes / row.peak_bytes for row in rows if row.allocated_bytes and row.peak_bytes]
    if parts:
        span = dict.fromkeys(records.short(end(parts)) for end in (min, max))
        yield f"What was allocated is {' to '.join(span)} times the memory counted."
