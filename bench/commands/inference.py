"""``python -m bench inference``: fused ISA against the authors' layout, and timm's MaxViT and Swin with our attention.

What is compared is timed in one interleaved run, a matmul that says how fast the machine is among it.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import flop_registry

from bench import measure
from bench.arguments import check_partition_size, device, folder, positive, size
from bench.measure import Step
from bench.providers import PROVIDERS, Provider, isa_module
from bench.records import format_size, short
from bench.workload import Workload
from isa_triton.inference import fuse

HELP = "fused inference against the authors' layout, timm's MaxViT and Swin: inference.csv"
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
    replace(PROVIDERS["isa"], name="isa-fused", module=lambda workload: fuse(isa_module(workload).eval())),
)
BLOCK = "ISA block"


class Row(NamedTuple):
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=folder, default="out", metavar="DIR", help="folder of inference.csv (default: out)")
    default = " ".join(map(format_size, SIZES))
    add("--sizes", nargs="*", type=size, default=list(SIZES), metavar="SIZE", help=f"maps (default: {default})")
    add(
        "--models", nargs="*", choices=MODELS, default=list(MODELS), help="of timm; none: leave them out (default: all)"
    )
    add("--channels", type=positive, default=512, metavar="C", help="of the block (default: 512)")
    add("--key-channels", type=positive, default=256, metavar="K", help="of the block (default: 256)")
    add("--value-channels", type=positive, default=512, metavar="V", help="of the block (default: 512)")
    add("--partition-size", type=size, default=(8, 8), metavar="P", help="8 or 8x4, height first (default: 8)")
    add("--rounds", type=positive, default=9, help="timed calls of each, interleaved (default: 9)")
    add("--device", type=device, default="cpu", help="default: cpu")


def run(args: argparse.Namespace) -> None:
    for map_ in args.sizes:
        check_partition_size(args.partition_size, map_)
    console = Console()
    console.width = max(console.width, 120)  # rather wrapped by the terminal than cut off
    rows: list[Row] = []
    for map_ in args.sizes:
        rows += block(args, map_)
    if args.models and not find_spec("timm"):
        console.print("timm is not installed (pip install timm): its models are left out")
        args.models = []
    for name in args.models:
        rows += model(args, name)
    for table in tables(rows):
        console.print(table)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([Row._fields, *rows])
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "inference.csv").write_text(text.getvalue())
    console.print(f"Wrote {args.out / 'inference.csv'}", highlight=False)


def block(args: argparse.Namespace, map_: tuple[int, int]) -> list[Row]:
    """The ISA block on one map."""
    widths = args.channels, args.key_channels, args.value_channels
    workload = Workload("module", "forward", *map_, *widths, args.partition_size)
    inputs = workload.inputs(args.device)
    makes = {p.name: partial(measure.step, p, workload, args.device, inputs) for p in BLOCKS}
    with FakeTensorMode():
        counts = {p.name: count(partial(measure.step, p, workload)) for p in BLOCKS}
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
        return torch.no_grad()(lambda: (network(x),))

    # twice as it is: what those two differ by is noise
    makes = {"timm": partial(step, False), "timm again": partial(step, False), "accelerated": partial(step, True)}
    counts = {who: count(make) for who, make in makes.items()}  # of real tensors: timm looks at values
    return _rows(name, (side, side), makes, counts, args)


def _rows(
    what: str,
    map_: tuple[int, int],
    makes: Mapping[str, Callable[[], Step]],
    counts: dict[str, tuple[int, int]],
    args: argparse.Namespace,
) -> list[Row]:
    """A row for everyone; the first is who the others are compared with."""
    steps = {name: make() for name, make in makes.items()}
    square = torch.ones(1024, 1024, device=args.device)
    timed = steps | {"matmul": lambda: (square @ square,)}
    seconds = measure.seconds(timed, rounds=args.rounds, budget=float("inf"), device=args.device)
    rate, first = 2 * 1024**3 / seconds["matmul"], seconds[next(iter(steps))]
    return [
        Row(
            what,
            name,
            *map_,
            seconds[name],
            first / seconds[name],
            *counts[name],
            matmul_share(step, args.device),
            rate,
        )
        for name, step in steps.items()
    ]


def count(make: Callable[[], Step]) -> tuple[int, int]:
    """FLOPs and peak bytes of one call; folding the weights is no part of it, the weights are."""
    with measure.Counter() as counter:
        step = make()
        counter.flops = 0
        step()
    return counter.flops, counter.peak_bytes


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
    found = []
    for title, members in (
        ("ISA block, times unfused", [row for row in rows if row.what == BLOCK]),
        ("timm's models, times timm", [row for row in rows if row.what != BLOCK]),
    ):
        table = Table(title=title, title_justify="left")
        for column in ("", "map", "", "ms", "times", "GFLOPs", "MiB", "in matmuls", "GFLOP/s", "matmul's"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in members:
            figures = (1e3 * row.seconds, row.times, row.flops / 1e9, row.peak_bytes / 2**20)
            rates = (row.flops / row.seconds / 1e9, row.matmul_rate / 1e9)
            cells = [*map(short, figures), f"{row.in_matmuls:.0%}", *map(short, rates)]
            table.add_row(row.what, format_size((row.height, row.width)), row.provider, *cells)
        if members:
            found.append(table)
    return found
