"""``python -m bench inference``: folded ISA against the authors' layout.

What is compared is timed in one interleaved run, a matmul that says how fast the machine is among it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import flop_registry

from bench import devices, measure, terminal
from bench.arguments import (
    add_device,
    add_out,
    add_partition_size,
    add_rounds,
    add_sizes,
    add_widths,
    check_partition_size,
)
from bench.compared import PROVIDERS, Provider, modules
from bench.measure import Step
from bench.records import format_size, short, write
from bench.terminal import Table, Terminal
from bench.workload import OnMap, Workload
from isa_triton.inference import fuse

SIZES = ((64, 64), (97, 97), (128, 128))
BLOCKS: tuple[Provider, ...] = (
    PROVIDERS["unfused"],
    PROVIDERS["isa"],
    replace(PROVIDERS["isa"], name="isa-folded", module=lambda workload: fuse(modules.isa_block(workload).eval())),
)
BLOCK = "ISA block"
Makes = Mapping[str, Callable[[], Step]]
Counts = Mapping[str, tuple[int, int]]
HEADER = ("what", "map", "provider", "ms", "times", "GFLOPs", "MiB", "in matmuls", "GFLOP/s", "matmul's", "timed by")
RATES = 3  # columns at the end that only --verbose shows


@dataclass(frozen=True)
class Row(OnMap):
    """A line of the CSV."""

    what: str  # the block
    provider: str
    height: int
    width: int
    seconds: float
    times: float  # as fast as the first of its group
    flops: int
    peak_bytes: int
    in_matmuls: float  # part of the time in operators that have FLOPs
    matmul_rate: float  # FLOPs per second of a matmul of 1024 x 1024 in the same run
    how: str  # seconds were found out, as `bench.devices.Timer` says it
    clocks: str  # of a GPU, as its driver reports them behind the calls

    def cells(self) -> list[str]:
        figures = (1e3 * self.seconds, self.times, self.flops / 1e9, self.peak_bytes / 2**20)
        rates = (self.flops / self.seconds / 1e9, self.matmul_rate / 1e9)
        where = self.what, format_size(self.size), self.provider
        return [*where, *map(short, figures), f"{self.in_matmuls:.0%}", *map(short, rates), self.how]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out(parser, "inference.csv")
    add_sizes(parser, SIZES, "maps of the block in pixels")
    add_widths(parser)
    add_partition_size(parser)
    add_rounds(parser, 9)
    add_device(parser)
    terminal.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    for map_ in args.sizes:
        check_partition_size(args.partition_size, map_)
    said, path, rows = Terminal(args), args.out / "inference.csv", list[Row]()
    said.say(f"Every row goes to {path}")
    with said.progress("maps", len(args.sizes)) as bar:
        for map_ in args.sizes:
            bar.now(format_size(map_))
            rows += block(args, map_)
            write(path, Row, rows)
            bar.advance()
    said.show(table(rows, args.verbose))
    how = devices.account((row.how for row in rows), (row.clocks for row in rows))
    said.end(" ".join(filter(None, (sentence(rows), how))), path)


def sentence(rows: Sequence[Row]) -> str:
    """How much faster ours are, from the slowest to the fastest."""
    times = [row.times for row in rows if row.provider == "isa-folded"]
    span = " to ".join(dict.fromkeys(f"{end(times):.2f}" for end in (min, max)))
    return f"In one interleaved run the folded block was {span} times as fast as unfused."


def block(args: argparse.Namespace, map_: tuple[int, int]) -> list[Row]:
    """The ISA block on one map."""
    widths = args.channels, args.key_channels, args.value_channels
    workload = Workload("module", "forward", *map_, *widths, args.partition_size)
    inputs = workload.inputs(args.device)
    makes = {p.name: partial(measure.step, p, workload, args.device, inputs) for p in BLOCKS}
    counts = {p.name: measure.count(partial(measure.step, p, workload)) for p in BLOCKS}
    return _rows(BLOCK, map_, makes, counts, args)


def _rows(what: str, map_: tuple[int, int], makes: Makes, counts: Counts, args: argparse.Namespace) -> list[Row]:
    """A row for everyone; the first is who the others are compared with."""
    steps = {name: make() for name, make in makes.items()}
    square = torch.ones(1024, 1024, device=args.device)
    timed = steps | {"matmul": lambda: (square @ square,)}
    samples = measure.samples(timed, rounds=args.rounds, budget=float("inf"), device=args.device)
    seconds, clocks = {name: median(each.seconds) for name, each in samples.items()}, devices.clocks(args.device)
    rate, first = 2 * 1024**3 / seconds["matmul"], seconds[next(iter(steps))]
    shares = {name: matmul_share(step, args.device) for name, step in steps.items()}
    times = {name: (seconds[name], first / seconds[name]) for name in steps}
    return [
        Row(what, name, *map_, *times[name], *counts[name], shares[name], rate, samples[name].how, clocks)
        for name in steps
    ]


def matmul_share(step: Step, device: str) -> float:
    """The part of a step's time that is spent in operators with a FLOP formula: matmuls and convolutions."""
    cpu = torch.device(device).type == "cpu"
    activities = [ProfilerActivity.CPU] if cpu else None  # else whatever there is
    with profile(activities=activities, acc_events=True) as profiler:  # torch 2.11 warns of events that are not kept
        step()
    column = "self_cpu_time_total" if cpu else "self_device_time_total"
    times = {event.key: getattr(event, column) for event in profiler.key_averages() if "::" in event.key}
    matmuls = {str(operator).replace(".", "::", 1) for operator in flop_registry}  # aten.mm is called aten::mm there
    return sum(time for name, time in times.items() if name in matmuls or "conv" in name) / sum(times.values())


def table(rows: Sequence[Row], rates: bool) -> Table:
    """Everyone on every map."""
    shown = len(HEADER) if rates else -RATES
    return Table("ISA block, times unfused", HEADER[:shown], [row.cells()[:shown] for row in rows], words=3)
