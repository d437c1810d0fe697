"""The roofline's predictions beside what others have measured and published, on an H100.

The points: dense attention forward, fp16, 16384 tokens a batch, 2048 channels in all (as in the FlashAttention-3
paper), beside its figures for Triton and FlashAttention-2; and windows, D = 32, 6 heads, beside FlashWindowAttention-2.
What is predicted is OUR kernel with the shipped tile. Beside Triton stands its binary for sm_90; beside
FlashAttention-2, which multiplies by warps (HMMA), that for sm_80, on the same GPU.

Only the first kind tests the model, for there the algorithm, the compiler and the matrix instructions are the same. Two
things pull apart there: under load an H100 does not hold the clock of its data sheet, so that predictions are too fast;
and our kernel finds the pixels of every block of keys anew, which costs it issue slots that theirs has free. The other
two kinds say how far apart kernels are. Our tiles for sm_80 read q from shared memory for every block of keys, by eight
warps, and shared memory binds; FlashAttention-2 holds q in registers. Windows are published without the size of the
batch: 64 maps are taken here, and a small batch, or permutes around the kernel, explain figures that are a fraction of
what memory allows. No measurement at hand tests the model where memory binds.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import mean

from bench.records import short
from bench.terminal import Table, Terminal
from bench.tiles import options
from bench.tiles.compile import Problem
from bench.tiles.report import Pass
from bench.tiles.roofline import MACHINES
from isa_triton.partition import Partition


@dataclass(frozen=True)
class Point:
    """A published figure."""

    whose: str
    tflops: float
    target: str  # whose binary of ours is like theirs
    problem: Problem
    pass_: str = "forward"


def _dense(tokens: int, width: int) -> Problem:
    return options.make_problem(
        tokens, width, width, "dense", heads=2048 // width, dtype="float16", maps=16384 // tokens
    )


def _windows(side: int) -> Problem:
    return Problem(Partition.local((64, 64), (side, side)), 32, 32, heads=6, dtype="float16", maps=64)


DENSE = {  # (tokens, width): TFLOP/s of FlashAttention-2 and of Triton
    (512, 64): (282, 340), (1024, 64): (306, 382), (16384, 64): (324, 403),
    (512, 128): (309, 323), (1024, 128): (350, 372), (16384, 128): (370, 395),
    (512, 256): (275, None),
}  # fmt: skip
WINDOWS = {(8, "forward"): 13.7, (16, "forward"): 60.3, (8, "backward"): 3.1, (16, "backward"): 17.1}
POINTS = (
    *(Point("Triton", t, "sm_90", _dense(*shape)) for shape, (_, t) in DENSE.items() if t),
    *(Point("FlashAttention-2", t, "sm_80", _dense(*shape)) for shape, (t, _) in DENSE.items()),
    *(Point("FlashWindowAttention-2", t, "sm_90", _windows(side), pass_) for (side, pass_), t in WINDOWS.items()),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all points there")
    options.add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    said, h100 = Terminal(args), MACHINES["H100"]
    with options.compilers(args, said) as binaries:
        passes = [Pass.shipped(p.problem, p.pass_, h100._replace(target=p.target), binaries) for p in POINTS]
    columns = ("pass", "by", "tokens", "width", "binary", "PREDICTED TFLOP/s", "published", "ratio", "bound by")
    rows, facts, ratios = list[list[object]](), [], []
    for point, whole in zip(POINTS, passes, strict=True):
        problem, tflops = point.problem, whole.flops / whole.seconds / 1e12
        ratios.append(tflops / point.tflops)
        bound = ", ".join(dict.fromkeys(kernel.prediction.bound for kernel in whole.kernels))
        rows.append([point.pass_, point.whose, problem.partition.tokens, problem.key_width, point.target,
                     short(tflops), f"{point.tflops:g}", f"{ratios[-1]:.2f}", bound])  # fmt: skip
        facts.append({"whose": point.whose, "pass": point.pass_, "tokens": problem.partition.tokens,
                      "width": problem.key_width, "heads": problem.heads, "maps": problem.maps,
                      "published": point.tflops, "predicted": tflops})  # fmt: skip
    said.show(Table("", columns, rows, words=("pass", "by", "bound by")))
    if args.json is not None:
        options.write_json(args.json, facts)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}, geometric mean {exp(mean(map(log, ratios))):.2f}"
    said.end(f"{len(rows)} points; predicted / published {spread}", *filter(None, [args.json]))
