"""The roofline's predictions beside what others have measured and published: how far to trust them.

The points are in bench/results/published.csv, as their sources print them: dense attention by Triton's tutorial, by
FlexAttention and by FlashAttention-2, on A100, H100 and B200, and windows of FlashWindowAttention-2. They were frozen
before the model was fitted to anything; every other point of a source is held out, and is not to be looked at when a
figure of the model is chosen. `SCORES` are the errors of either half; a test fails where they get worse.

What is predicted is a textbook's kernel (bench/tiles/textbook.py), read as anybody's (bench/tiles/foreign.py), with the
tile of `TILES` that is predicted to be fastest, as the published ones were tuned: the binary for the GPU itself beside
what Triton compiled, that for sm_80 on the same GPU beside FlashAttention-2, which multiplies by warps (HMMA).

What pulls apart: under load an H100 does not hold the clock of its data sheet, and a B200 even less; FlashAttention-2
holds q in registers, where Triton's binaries for sm_80 read it from shared memory for every block of keys; windows are
published with a mask and with normalised keys, which the textbook has not, and with the host's part of a call, which is
most of the shortest. Backward passes of others are in the file and not scored: they add dq atomically, as ours do not.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from bench.terminal import Table, Terminal
from bench.tiles import options
from bench.tiles.binaries import Binaries
from bench.tiles.foreign import ForeignCall, Tensor, read
from bench.tiles.roofline import MACHINES, Machine, Prediction, predict
from isa_triton.axis import ceil_div

POINTS = Path(__file__).parent.parent / "results" / "published.csv"
HALVES = ("fitted", "held out")
TEXTBOOK = Path(__file__).parent / "textbook.py"
TILES = (  # (queries, keys, warps, stages) that a published kernel may have been tuned to
    (128, 64, 4, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 4, 3), (128, 64, 4, 2), (128, 32, 4, 2),
    (64, 32, 8, 2),
)  # fmt: skip
FASTEST = {  # of these, by width, those that are predicted to be fastest for a point
    32: ((128, 64, 4, 3), (64, 64, 4, 3)), 64: ((128, 64, 4, 3),), 128: ((128, 128, 8, 3), (128, 64, 8, 3)),
    256: ((64, 32, 8, 2),),
}  # fmt: skip
GROUPS = {  # of points: those whose text and compiler are the textbook's, and all
    "Triton": ("Triton", "FlexAttention"),
    "all": ("Triton", "FlexAttention", "FlashAttention-2", "FlashWindowAttention-2"),
}
SCORES = {  # by group and half: the mean error and the worst
    ("Triton", "fitted"): (0.266, 0.385), ("Triton", "held out"): (0.272, 0.372),
    ("all", "fitted"): (0.380, 2.454), ("all", "held out"): (0.300, 0.761),
}  # fmt: skip


class Score(NamedTuple):
    """How far predictions are off: |predicted / published - 1|, and the same with all times multiplied by a factor."""

    points: int
    mean: float
    worst: float
    factor: float
    mean_scaled: float
    worst_scaled: float


@dataclass(frozen=True)
class Point:
    """A published time of a forward pass, fp16."""

    half: str
    whose: str
    gpu: Machine  # with the target whose binary is like theirs
    tokens: int
    width: int
    heads: int
    items: int  # windows, or maps
    bias: bool
    seconds: float
    source: str

    @classmethod
    def read(cls, row: dict[str, str]) -> Point:
        gpu, windows = MACHINES[row["gpu"]]._replace(target=row["target"]), 64 if row["partition"] == "local" else 1
        tokens, width, heads, maps = (int(row[name]) for name in ("tokens", "width", "heads", "maps"))
        seconds, bias = 1e-6 * float(row["us"]), row["bias"] == "bias"
        return cls(row["half"], row["whose"], gpu, tokens, width, heads, maps * windows, bias, seconds, row["source"])

    def calls(self, quick: bool = False) -> Iterator[ForeignCall]:
        """The textbook's kernel with every tile, or with each of `FASTEST`, that is not larger than the group."""
        rows = Tensor("fp16", self.items * self.heads * self.tokens * self.width)
        tensors = {**dict.fromkeys(("q", "k", "v", "out"), rows), "bias": None}
        if self.bias:
            tensors["bias"] = Tensor("fp16", self.heads * self.tokens**2)
        numbers = {"scale": self.width**-0.5, "tokens": self.tokens, "heads": self.heads, "WIDTH": self.width}
        for m, n, warps, stages in FASTEST[self.width] if quick else TILES:
            if m <= max(64, self.tokens):
                blocks = {"BLOCK_M": m, "BLOCK_N": n, "RAGGED": bool(self.tokens % m or self.tokens % n)}
                grid = ceil_div(self.tokens, m), self.items * self.heads
                options = {"num_warps": warps, "num_stages": stages}
                yield ForeignCall(self.gpu.target, TEXTBOOK, "attend", grid, tensors | numbers | blocks, options)

    def predicted(self, binaries: Binaries, quick: bool = False) -> Prediction:
        """Of the fastest tile; those that spill come last."""
        found = [(call, *read(call, binaries)) for call in self.calls(quick)]
        fits = [(bool(wrong), predict(call, binary, self.gpu)) for call, binary, wrong in found if binary.ctas_per_sm]
        return min(fits, key=lambda each: (each[0], each[1].seconds))[1]


def points(path: Path = POINTS) -> list[Point]:
    """Those of a file that are scored."""
    with path.open(newline="") as file:
        return [Point.read(row) for row in csv.DictReader(file) if row["pass"] == "forward"]


def scores(found: Sequence[Point], predictions: Sequence[Prediction]) -> dict[tuple[str, str], Score]:
    """By group of points and half; a factor is that of the group's fitted half."""
    scored = dict[tuple[str, str], Score]()
    pairs = list(zip(found, predictions, strict=True))
    for group, whose in GROUPS.items():
        ratios = {half: [prediction.seconds / point.seconds for point, prediction in pairs
                         if point.half == half and point.whose in whose] for half in HALVES}  # fmt: skip
        factor = exp(-mean(map(log, ratios["fitted"])))
        for half, of_half in ratios.items():
            errors, scaled = ([abs(scale * ratio - 1) for ratio in of_half] for scale in (1.0, factor))
            scored[group, half] = Score(len(errors), mean(errors), max(errors), factor, mean(scaled), max(scaled))
    return scored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all points there")
    parser.add_argument("--quick", action="store_true",
                        help="only tiles that are known to be fastest for some point: a quarter of them")  # fmt: skip
    options.add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    said, found, predictions = Terminal(args), points(), list[Prediction]()
    with options.compilers(args, said) as binaries:
        predictions += (point.predicted(binaries, args.quick) for point in found)
    header = ("by", "on", "binary", "tokens", "width", "heads", "items", "PREDICTED us", "published us", "ratio",
              "half", "bound by")  # fmt: skip
    rows = list[list[object]]()
    for point, prediction in zip(found, predictions, strict=True):
        us = 1e6 * prediction.seconds, 1e6 * point.seconds
        shape = point.tokens, point.width, point.heads, point.items
        rows.append([point.whose, point.gpu.name, point.gpu.target, *shape, *(f"{n:.1f}" for n in us),
                     f"{us[0] / us[1]:.2f}", point.half, prediction.bound])  # fmt: skip
    said.show(Table("", header, rows, words=("by", "on", "binary", "half", "bound by")))
    if args.json is not None:
        facts = (dict(zip(header, row, strict=True)) for row in rows)
        sources = (point.source for point in found)
        options.write_json(args.json, [{**fact, "source": source} for fact, source in zip(facts, sources, strict=True)])
    for (group, half), score in scores(found, predictions).items():
        said.say(
            f"{group}, {half}, {score.points} points: PREDICTED / published is off by {score.mean:.1%} in the mean, "
            f"{score.worst:.1%} at worst; times {score.factor:.2f}, as fitted, {score.mean_scaled:.1%} and "
            f"{score.worst_scaled:.1%}"
        )
    said.end(f"{len(found)} points; predicted / published beside each", *filter(None, [args.json]))
