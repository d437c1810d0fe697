"""``python -m bench norm``: how exact fp32 training is on a CPU, and what that costs, with our norm and with PyTorch's.

Batch normalisation alone on channels_last maps, on NCHW ones too, and ISA with either norm: outputs and gradients
against fp64, the largest difference as a part of the largest entry. ISA has GELU, for the derivative of ReLU jumps, and
what rounding moves across the jump would be all that is seen. Then forward and backward are timed, interleaved.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from bench import measure, terminal
from bench.arguments import add_budget, add_out, add_rounds, add_sizes, positive
from bench.records import format_size, write
from bench.terminal import Table, Terminal
from bench.workload import OnMap
from isa_triton import InterlacedSparseSelfAttention
from isa_triton.norm import BatchNorm2d

SIZES = ((97, 33), (128, 128))
OURS, PYTORCHS, NCHW = "ours", "PyTorch's", "PyTorch's, NCHW"
NORMS: dict[str, type[nn.BatchNorm2d]] = {OURS: BatchNorm2d, PYTORCHS: nn.BatchNorm2d}


@dataclass(frozen=True)
class Row(OnMap):
    """A line of the CSV: a layer with one norm, on one map."""

    layer: str  # the norm alone, or ISA
    norm: str
    channels: int
    height: int
    width: int
    output_error: float
    gradient_error: float  # the largest of all gradients
    seconds: float
    rounds: int
    host: str
    versions: str

    @property
    def ms(self) -> str:
        return f"{1000 * self.seconds:.3g}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out(parser, "norm.csv")
    add_sizes(parser, SIZES)
    parser.add_argument("--channels", type=positive, default=512, metavar="C", help="of the map; K is half of it")
    add_rounds(parser, 5)
    add_budget(parser, 60.0)
    terminal.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    said, path, rows = Terminal(args), args.out / "norm.csv", list[Row]()
    said.say(f"Every row goes to {path}")
    with said.progress("layers", 2 * len(args.sizes)) as bar:
        for size in args.sizes:
            for layer, makes in layers(args.channels).items():
                bar.now(f"{layer} of {format_size(size)}")
                rows += compare(layer, makes, size, args)
                write(path, Row, rows)
                bar.advance()
    lines = [
        (r.layer, format_size(r.size), r.norm, *(f"{x:.1e}" for x in (r.output_error, r.gradient_error)), r.ms)
        for r in rows
    ]
    threads = torch.get_num_threads()
    title = f"Training in fp32 on {threads} thread{'s' * (threads > 1)}, {args.channels} channels, against fp64"
    said.show(Table(title, ("layer", "map", "norm", "output", "gradients", "ms"), lines, words=3))
    said.end(f"ISA's training step takes {_cost(rows)} of what it takes with PyTorch's norm.", path)


def _cost(rows: list[Row]) -> str:
    """From the least to the most of the ratios of times."""
    times = {(r.height, r.width, r.norm): r.seconds for r in rows if r.layer == "ISA"}
    ratios = sorted(times[h, w, OURS] / times[h, w, PYTORCHS] for h, w, norm in times if norm == OURS)
    return " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (ratios[0], ratios[-1])))


def layers(channels: int) -> dict[str, dict[str, Callable[[], nn.Module]]]:
    """What is compared, by layer and norm."""
    widths, alone = (channels, max(1, channels // 2), channels), NORMS | {NCHW: nn.BatchNorm2d}
    return {
        "norm": {name: partial(kind, channels) for name, kind in alone.items()},
        "ISA": {
            name: partial(InterlacedSparseSelfAttention, *widths, norm_layer=kind, activation=nn.GELU)
            for name, kind in NORMS.items()
        },
    }


def compare(
    layer: str, makes: dict[str, Callable[[], nn.Module]], size: tuple[int, int], args: argparse.Namespace
) -> list[Row]:
    """The rows of a layer on a map: its errors with every norm, its seconds in one interleaved run."""
    torch.manual_seed(0)
    x, upstream = torch.randn(2, 1, args.channels, *size) + torch.tensor([1.0, 0.0]).view(2, 1, 1, 1, 1)
    steps: dict[str, measure.Step] = {}
    for norm, make in makes.items():
        torch.manual_seed(0)
        steps[norm] = step(make(), x, upstream, norm)
    torch.manual_seed(0)
    exact = step(makes[PYTORCHS]().double(), x.double(), upstream.double(), PYTORCHS)()
    wrong = {norm: [_error(*pair) for pair in zip(call(), exact, strict=True)] for norm, call in steps.items()}
    timed = measure.samples(steps, rounds=args.rounds, budget=args.budget)
    seconds = {norm: sorted(each.seconds)[len(each.seconds) // 2] for norm, each in timed.items()}
    host, versions = (measure.conditions()[name] for name in ("host", "versions"))
    rows = []
    for norm, (output, *gradients) in wrong.items():
        wrongest, calls = max(gradients), len(timed[norm].seconds)
        rows.append(Row(layer, norm, args.channels, *size, output, wrongest, seconds[norm], calls, host, versions))
    return rows


def step(module: nn.Module, x: Tensor, upstream: Tensor, norm: str) -> measure.Step:
    """A training step, which returns the output and all gradients."""
    layout = torch.contiguous_format if norm == NCHW else torch.channels_last
    x, upstream = (t.clone(memory_format=layout) for t in (x, upstream))
    x.requires_grad_()
    copied = copy.deepcopy(module)
    return measure.training(lambda: copied(x), (x, *copied.parameters()), upstream)


def _error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.detach() - exact.detach()).abs().max() / exact.detach().abs().max())
