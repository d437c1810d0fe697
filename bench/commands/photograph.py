"""``python -m bench photograph``: IANet on a photograph, its head beside the dense one.

The whole network, a ResNet with output stride 8 and random weights, runs on matplotlib's photograph scaled to each
size. Then the heads are timed, interleaved, on the map that the backbone has left. Bytes and FLOPs are counted on fake
tensors: the head's parameters, input, output and everything in between. Dense attention is timed as torch fuses it; as
published, with its scores in memory, it is counted only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.cbook import get_sample_data
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import reference
from bench import measure
from bench.arguments import device, folder, positive, size
from bench.heads import CONTEXTS, head
from bench.records import format_size, short, write_whole
from isa_triton.models.ianet import ianet

HELP = "IANet on a photograph, ISA's head beside the dense one, in seconds and bytes: photograph.csv"
SIZES = ((513, 769), (1024, 2048))
WIDTHS = (2048, 512, 19)  # of the backbone's map, of the heads, of the logits
UNFUSED = "SA, scores in memory"


class Row(NamedTuple):
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

    @property
    def image(self) -> str:
        return format_size((self.height, self.width))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=folder, default="out", metavar="DIR", help="folder of photograph.csv (default: out)")
    default = " ".join(map(format_size, SIZES))
    add("--sizes", nargs="+", type=size, default=list(SIZES), metavar="SIZE", help=f"of images (default: {default})")
    add("--heads", nargs="+", choices=CONTEXTS, default=["ISA", "SA"], help="beside each other (default: ISA SA)")
    add("--backbone", default="resnet50", metavar="NAME", help="a ResNet of torchvision (default: resnet50)")
    add("--rounds", type=positive, default=3, help="at most so many timed calls of each (default: 3)")
    add("--budget", type=positive, default=40, metavar="S", help="repeat no head after so many seconds (default: 40)")
    add("--device", type=device, default="cpu", help="default: cpu")


def run(args: argparse.Namespace) -> None:
    console = Console()
    console.width = max(console.width, 90)  # rather wrapped by the terminal than cut off
    try:
        network = ianet(WIDTHS[2], name=args.backbone, head=head("ISA", *WIDTHS), auxiliary=False)
    except (ImportError, ValueError) as error:
        raise argparse.ArgumentError(None, str(error)) from error
    network.eval().to(args.device)
    rows: list[Row] = []
    for image in args.sizes:
        rows += compare(network, image, args)
        whole = f"the whole network, once, {rows[-1].network_seconds:.1f} s"
        console.print(f"{rows[-1].image}: {whole}", highlight=False)
    console.print(table(rows, args.backbone))
    write_whole(args.out / "photograph.csv", Row._fields, rows)
    console.print(f"Wrote {args.out / 'photograph.csv'}", highlight=False)


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
    begin = time.perf_counter()
    assert network(x)["out"].isfinite().all()  # waits for a GPU too
    whole = time.perf_counter() - begin
    hook.remove()
    (map_,) = maps
    heads: dict[str, Callable[[], nn.Module]] = {name: partial(head, name, *WIDTHS) for name in args.heads}
    counted = heads | ({UNFUSED: unfused} if "SA" in heads else {})
    counts = {name: measure.count(partial(step, make, map_.shape)) for name, make in counted.items()}
    steps = {name: call(make().eval().to(args.device), map_) for name, make in heads.items()}
    seconds = measure.seconds(steps, rounds=args.rounds, budget=args.budget, device=args.device)
    kind = torch.device(args.device).type
    H, W = map_.shape[2:]
    return [Row(name, *image, H, W, kind, seconds.get(name), *counts[name], whole) for name in counted]


def unfused() -> nn.Module:
    """The dense head as published."""
    module = head("SA", *WIDTHS)
    C = WIDTHS[1]
    module[0][1] = reference.SA(C, C // 2, C // 2, C)  # type: ignore[index]
    return module


def step(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> measure.Step:
    """One call of a head, everything that it needs made here."""
    return call(make().eval(), torch.empty(shape))


def call(module: nn.Module, x: Tensor) -> measure.Step:
    return torch.no_grad()(lambda: (module(x),))


def table(rows: list[Row], backbone: str) -> Table:
    """A line a head; "times" are times what the first head of the same image takes."""
    title = f"Heads behind {backbone}, {rows[0].device}, {torch.get_num_threads()} threads"
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("image", "map", "head", "s", "times", "GFLOPs", "MiB", "times"):
        result.add_column(column, justify="left" if column == "head" else "right", no_wrap=True)
    for i, row in enumerate(rows):
        first = next(other for other in rows if other.image == row.image)
        assert first.seconds is not None
        time = ("-", "-") if row.seconds is None else (short(row.seconds), short(row.seconds / first.seconds))
        bytes_ = f"{row.peak_bytes / 2**20:,.0f}", short(row.peak_bytes / first.peak_bytes)
        where = (row.image, format_size((row.map_height, row.map_width))) if row is first else ("", "")
        last = i + 1 == len(rows) or rows[i + 1].image != row.image
        result.add_row(*where, row.head, *time, short(row.flops / 1e9), *bytes_, end_section=last)
    return result
