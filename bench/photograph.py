"""``python -m bench photograph``: IANet on a photograph, its head beside the dense one.

The whole network, a ResNet with output stride 8 and random weights, runs on matplotlib's photograph scaled to each
size. Then the heads are timed, interleaved, on the map that the backbone has left. Bytes and FLOPs are counted on fake
tensors: the head's parameters, input, output and everything in between. Dense attention is timed by torch's
scaled_dot_product_attention; as published, with its scores in memory, it is counted only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.cbook import get_sample_data
from torch import Tensor, nn

from bench import devices, measure, terminal
from bench.arguments import add_budget, add_device, add_out, add_rounds, add_sizes
from bench.compared.heads import CONTEXTS, DENSE_AS_PUBLISHED, Widths, classified, head
from bench.records import format_size, short, write
from bench.terminal import Table, Terminal
from bench.workload import OnMap
from isa_triton.models.ianet import ianet

SIZES = ((513, 769), (1024, 2048))
WIDTHS = (2048, 512, 19)  # of the backbone's map, of the heads, of the logits
AS_PUBLISHED = "SA, scores in memory"


@dataclass(frozen=True)
class Row(OnMap):
    """A line of the CSV: one head on one image."""

    head: str
    height: int  # of the image
    width: int
    map_height: int
    map_width: int
    device: str
    seconds: float | None  # None where it is counted only
    flops: int
    peak_bytes: int
    network_seconds: float  # of one call of the whole network with ISA's head
    how: str  # seconds were found out, as `bench.devices.Timer` says it; nothing where it is counted only
    clocks: str  # of a GPU, as its driver reports them behind the calls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_out(parser, "photograph.csv")
    add_sizes(parser, SIZES, "images in pixels")
    add("--heads", nargs="+", choices=CONTEXTS, default=["ISA", "SA"], help="beside each other")
    add("--backbone", default="resnet50", metavar="NAME", help="a ResNet of torchvision")
    add_rounds(parser, 3)
    add_budget(parser, 40.0)
    add_device(parser)
    terminal.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    said, path = Terminal(args), args.out / "photograph.csv"
    try:
        network = ianet(WIDTHS[2], name=args.backbone, head=head("ISA", *WIDTHS), auxiliary=False)
    except (ImportError, ValueError) as error:
        raise argparse.ArgumentError(None, str(error)) from error
    network.eval().to(args.device)
    rows: list[Row] = []
    said.say(f"Every row goes to {path}")
    with said.progress("images", len(args.sizes)) as bar:
        for image in args.sizes:
            bar.now(format_size(image))
            rows += compare(network, image, args)
            write(path, Row, rows)
            bar.advance()
    title = (
        f"Heads behind {args.backbone}, {rows[0].device}, {torch.get_num_threads()} threads; times: the first head's"
    )
    header = ("image", "map", "head", "s", "times s", "GFLOPs", "MiB", "times MiB")
    said.show(Table(title, header, list(lines(rows)), words=3))
    networks = {format_size(row.size): f"{row.network_seconds:.1f} s" for row in rows}
    once = " and ".join(f"{seconds} at {image}" for image, seconds in networks.items())
    how = devices.account((row.how for row in rows), (row.clocks for row in rows))
    said.end(" ".join(filter(None, (f"The whole network with ISA's head, once: {once}.", how))), path)


def photograph(image: tuple[int, int]) -> Tensor:
    """The portrait of Grace Hopper that matplotlib has, scaled to (height, width): [1, 3, height, width]."""
    photo = torch.tensor(plt.imread(str(get_sample_data("grace_hopper.jpg", asfileobj=False))))
    pixels = photo.permute(2, 0, 1).unsqueeze(0)
    return F.interpolate(pixels / 255 - 0.5, image, mode="bilinear", antialias=True)


@torch.no_grad()
def compare(network: Any, image: tuple[int, int], args: argparse.Namespace) -> list[Row]:
    """The whole network once, then every head on the backbone's map."""
    maps: list[Tensor] = []
    hook = network.head.register_forward_pre_hook(lambda module, inputs: maps.append(*inputs))
    x = photograph(image).to(args.device)
    outputs = list[Tensor]()

    def once() -> tuple[Tensor, ...]:
        outputs[:] = [network(x)["out"]]
        return tuple(outputs)

    whole = measure.seconds({"network": once}, rounds=0, device=args.device)["network"]
    assert outputs[0].isfinite().all()
    hook.remove()
    map_ = maps[0]  # the first of as many as there were calls
    heads: dict[str, Callable[[], nn.Module]] = {name: partial(head, name, *WIDTHS) for name in args.heads}
    counted = heads | ({AS_PUBLISHED: dense_as_published} if "SA" in heads else {})
    counts = {name: measure.count(partial(step, make, map_.shape)) for name, make in counted.items()}
    steps = {name: measure.forward(make().eval().to(args.device), map_) for name, make in heads.items()}
    samples = measure.samples(steps, rounds=args.rounds, budget=args.budget, device=args.device)
    clocks = devices.clocks(args.device)
    H, W = map_.shape[2:]
    where = *image, H, W, torch.device(args.device).type
    found = {name: (median(seconds), how, clocks) for name, (seconds, how) in samples.items()}
    times = {name: found.get(name, (None, "", "")) for name in counted}
    return [Row(name, *where, times[name][0], *counts[name], whole, *times[name][1:]) for name in counted]


def dense_as_published() -> nn.Module:
    """The dense head with its scores in memory."""
    return classified(DENSE_AS_PUBLISHED(Widths(*WIDTHS[:2])), WIDTHS[2])


def step(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> measure.Step:
    """One call of a head, everything that it needs made here."""
    return measure.forward(make().eval(), torch.empty(shape))


def lines(rows: list[Row]) -> Iterator[list[str | None]]:
    """A line a head; "times" are times what the first head of the same image takes."""
    for image in dict.fromkeys(row.size for row in rows):
        first, *others = (row for row in rows if row.size == image)
        for row in (first, *others):
            sizes = image, (row.map_height, row.map_width)
            times = [None if row.seconds is None else short(row.seconds / unit) for unit in (1, first.seconds or 1)]
            size = [f"{row.peak_bytes / 2**20:,.0f}", short(row.peak_bytes / first.peak_bytes)]
            yield [*map(format_size, sizes), row.head, *times, short(row.flops / 1e9), *size]
        yield []
