"""``python -m bench paper``: FLOPs and parameters of the paper's heads, beside what the authors' script says of them.

Input is a map of 2048 channels, as a ResNet leaves it, and the 3x3 convolution that reduces it is counted. The script
counts 2 FLOPs to a multiply-add and one for a convolution's bias, nothing for normalisation and softmax; key and query
as one convolution each, where the modules have two; and convolutions on the map without the padding that attention
needs. Exact is what the modules really compute in convolutions and matrix products, as torch counts it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import measure, terminal
from bench.arguments import add_out
from bench.compared.heads import CONTEXTS, Widths
from bench.records import format_size, write
from bench.terminal import Table, Terminal

CHANNELS = 2048
MAPS = ((64, 128), (97, 97), (128, 128), (128, 256), (256, 256))
# GFLOPs for each of MAPS that segmentor/tools/cost_helper.py of openseg-group/openseg.pytorch prints.
AUTHORS = {
    "ISA": (191.4, 221.0, 386.1, 785.0, 1621.6),
    "SA": (240.5, 288.0, 618.5, 1786.8, 5772.6),
    "RCCA": (400.9, 460.5, 804.2, 1618.1, 3255.5),
    "PPM": (309.3, 355.3, 618.6, 1237.1, 2474.0),
    "ASPP": (245.9, 282.4, 491.8, 983.6, 1967.2),
}
# The heads before their classifiers.
HEADS: dict[str, Callable[[], nn.Module]] = {name: partial(CONTEXTS[name], Widths(CHANNELS, 512)) for name in AUTHORS}
# What exact counting has and the script has not: the second convolutions of key and query, convolutions of padded
# pixels, and (less) biases.
BEYOND = ("second", "padding", "biases")
SECOND = re.compile(r"\b(key|query)\.1\.")  # names of those second convolutions


@dataclass(frozen=True)
class Row:
    """A line of the CSV: a whole head on a map."""

    module: str
    height: int
    width: int
    authors_gflops: float
    script_gflops: float  # ours by the script's conventions
    exact_gflops: float
    parameters: int


@dataclass(frozen=True)
class Counted:
    """FLOPs of a head on a map by the script's conventions, and what exact counting adds to them, by `BEYOND`."""

    script: int
    beyond: dict[str, int]
    parameters: int

    @property
    def exact(self) -> int:
        return self.script + sum(self.beyond.values())


def count(head: Callable[[], nn.Module], height: int, width: int) -> Counted:
    """Runs a head on fake tensors, and asks every convolution what it did."""
    beyond = dict.fromkeys(BEYOND, 0)

    def convolved(name: str, conv: nn.Conv2d, _: tuple[Tensor, ...], output: Tensor) -> None:
        pixels = output.shape[2] * output.shape[3]
        flops = 2 * conv.weight.numel()  # a pixel
        if SECOND.search(name):
            beyond["second"] += flops * pixels
            return
        inside = min(pixels, height * width)
        beyond["padding"] += flops * (pixels - inside)
        beyond["biases"] -= conv.out_channels * inside

    with FakeTensorMode(), measure.Counter() as counter, torch.no_grad():
        module = head().eval()
        for name, conv in module.named_modules():
            if isinstance(conv, nn.Conv2d):
                conv.register_forward_hook(partial(convolved, name))
        module(torch.empty(1, CHANNELS, height, width))
    return Counted(counter.flops - sum(beyond.values()), beyond, parameters(module))


def parameters(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(parameter.numel() for parameter in module.parameters())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out(parser, "paper.csv")
    terminal.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    path = args.out / "paper.csv"
    rows, lines = list[Row](), list[list[str]]()
    for i, map_ in enumerate(MAPS):
        for name, make in HEADS.items():
            counted, authors = count(make, *map_), AUTHORS[name][i]
            script, exact = counted.script / 1e9, counted.exact / 1e9
            rows.append(Row(name, *map_, authors, round(script, 3), round(exact, 3), counted.parameters))
            off = f"{100 * (script / authors - 1):+.2f}%"
            beyond = [f"{flops / 1e9:.2f}" if flops else "" for flops in counted.beyond.values()]
            lines.append([format_size(map_), name, f"{authors:.1f}", f"{script:.1f}", off, *beyond, f"{exact:.1f}"])
        lines.append([])
    write(path, Row, rows)
    said = Terminal(args)
    title = f"GFLOPs of whole heads on {CHANNELS} x height x width: script + {' + '.join(BEYOND)} = exact"
    said.show(Table(title, ("map", "head", "authors", "script", "off by", *BEYOND, "exact"), lines, words=2))
    learned = [[row.module, f"{row.parameters:,}"] for row in rows[: len(HEADS)]]
    for name in ("ISA", "SA"):
        _, block = HEADS[name]().children()
        learned.append([f"{name} without its 3x3 convolution", f"{parameters(block):,}"])
    said.show(Table("", ("head", "parameters"), learned))
    worst = max(abs(row.script_gflops / row.authors_gflops - 1) for row in rows)
    said.end(f"The authors' figures, counted by their conventions, agree to {worst:.2%} at worst.", path)
