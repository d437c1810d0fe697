"""``python -m bench inference``: folded ISA against the authors' layout, and timm's MaxViT and Swin with our attention.

What is compared is timed in one interleaved run, a matmul that says how fast the machine is among it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import flop_registry

from bench import measure
from bench.arguments import add_out, add_widths, check_partition_size, device, positive, size
from bench.compared import PROVIDERS, Provider, modules
from bench.measure import Step
from bench.records import console, format_size, short, table, write
from bench.workload import OnMap, Workload
from isa_triton.inference import fuse

SIZES = ((64, 64), (97, 97), (128, 128))
MODELS = {  # and sides of images
    "maxvit_tiny_tf_224": 224,
    "maxvit_nano_rw_256": 256,
    "maxvit_rmlp_nano_rw_256": 256,
    "swin_tiny_patch4_window7_224": 224,
}
BLOCKS: tuple[Provider, ...] = (
    PROVIDERS["unfused"],
    PROVIDERS["isa"],
    replace(PROVIDERS["isa"], name="isa-folded", module=lambda workload: fuse(modules.isa_block(workload).eval())),
)
BLOCK = "ISA block"
Makes = Mapping[str, Callable[[], Step]]
Counts = Mapping[str, tuple[int, int]]
HEADER = ("", "map", " ", "ms", "times", "GFLOPs", "MiB", "in matmuls", "GFLOP/s", "matmul's")


@dataclass(frozen=True)
class Row(OnMap):
    """A line of the CSV."""

    what: str  # the block or a model
    provider: str
    height: int  # of the block's map or the model's image
    width: int
    seconds: float
    times: float  # as fast as the first of its group
    flops: int
    peak_bytes: int
    in_matmuls: float  # part of the time in operators that have FLOPs
    matmul_rate: float  # FLOPs per second of a matmul of 1024 x 1024 in the same run

    def cells(self) -> list[str]:
        figures = (1e3 * self.seconds, self.times, self.flops / 1e9, self.peak_bytes / 2**20)
        rates = (self.flops / self.seconds / 1e9, self.matmul_rate / 1e9)
        where = self.what, format_size(self.size), self.provider
        return [*where, *map(short, figures), f"{self.in_matmuls:.0%}", *map(short, rates)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_out(parser, "inference.csv")
    default = " ".join(map(format_size, SIZES))
    add("--sizes", nargs="*", type=size, default=list(SIZES), metavar="SIZE", help=f"maps (default: {default})")
    models = "of timm; none: leave them out (default: all)"
    add("--models", nargs="*", choices=MODELS, default=list(MODELS), help=models)
    add_widths(parser)
    add("--partition-size", type=size, default=(8, 8), metavar="P", help="8 or 8x4, height first (default: 8)")
    add("--rounds", type=positive, default=9, help="timed calls of each, interleaved (default: 9)")
    add("--device", type=device, default="cpu", help="default: cpu")


def run(args: argparse.Namespace) -> None:
    for map_ in args.sizes:
        check_partition_size(args.partition_size, map_)
    terminal, path = console(120), args.out / "inference.csv"
    rows = [row for map_ in args.sizes for row in block(args, map_)]
    if args.models and not find_spec("timm"):
        terminal.print("timm is not installed (pip install timm): its models are left out")
        args.models = []
    rows += [row for name in args.models for row in model(args, name)]
    terminal.print(*tables(rows))
    write(path, Row, rows)
    terminal.print(f"Wrote {path}")


def block(args: argparse.Namespace, map_: tuple[int, int]) -> list[Row]:
    """The ISA block on one map."""
    widths = args.channels, args.key_channels, args.value_channels
    workload = Workload("module", "forward", *map_, *widths, args.partition_size)
    inputs = workload.inputs(args.device)
    makes = {p.name: partial(measure.step, p, workload, args.device, inputs) for p in BLOCKS}
    counts = {p.name: measure.count(partial(measure.step, p, workload)) for p in BLOCKS}
    return _rows(BLOCK, map_, makes, counts, args)


def model(args: argparse.Namespace, name: str) -> list[Row]:
    """One of timm's models as it is, and accelerated."""
    import timm

    from isa_triton.models.timm import accelerate

    side = MODELS[name]

    def step(ours: bool) -> Step:
        with torch.device(args.device):
            network, x = timm.create_model(name).eval(), torch.randn(1, 3, side, side)
        network = accelerate(network) if ours else network
        return measure.forward(network, x)

    # twice as it is: what those two differ by is noise
    makes = {"timm": partial(step, False), "timm again": partial(step, False), "accelerated": partial(step, True)}
    counts = {who: measure.count(make, fake=False) for who, make in makes.items()}  # timm looks at values
    return _rows(name, (side, side), makes, counts, args)


def _rows(what: str, map_: tuple[int, int], makes: Makes, counts: Counts, args: argparse.Namespace) -> list[Row]:
    """A row for everyone; the first is who the others are compared with."""
    steps = {name: make() for name, make in makes.items()}
    square = torch.ones(1024, 1024, device=args.device)
    timed = steps | {"matmul": lambda: (square @ square,)}
    seconds = measure.seconds(timed, rounds=args.rounds, budget=float("inf"), device=args.device)
    rate, first = 2 * 1024**3 / seconds["matmul"], seconds[next(iter(steps))]
    shares = {name: matmul_share(step, args.device) for name, step in steps.items()}
    times = {name: (seconds[name], first / seconds[name]) for name in steps}
    return [Row(what, name, *map_, *times[name], *counts[name], shares[name], rate) for name in steps]


def matmul_share(step: Step, device: str) -> float:
    """The part of a step's time that is spent in operators with a FLOP formula: matmuls and convolutions."""
    cpu = torch.device(device).type == "cpu"
    with profile(activities=[ProfilerActivity.CPU] if cpu else None) as profiler:  # else whatever there is
        step()
    column = "self_cpu_time_total" if cpu else "self_device_time_total"
    times = {event.key: getattr(event, column) for event in profiler.key_averages() if "::" in event.key}
    matmuls = {str(operator).replace(".", "::", 1) for operator in flop_registry}  # aten.mm is called aten::mm there
    return sum(time for name, time in times.items() if name in matmuls or "conv" in name) / sum(times.values())


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for the block and one for the models."""
    blocks, models = ([row.cells() for row in rows if (row.what == BLOCK) == of_block] for of_block in (True, False))
    titled = {"ISA block, times unfused": blocks, "timm's models, times timm": models}
    return [table(title, HEADER, cells, words=3) for title, cells in titled.items() if cells]
