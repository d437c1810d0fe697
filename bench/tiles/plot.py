"""Draw the tiles of one problem, and the shipped kernels under the roofline of a GPU. Times are PREDICTED.

tiles-TARGET.png: over blocks of queries and keys the registers, the programs at a time and the predicted time.
roofline-TARGET.png: what shipped kernels are predicted to reach, over the products that they do a byte.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from bench import records
from bench.arguments import add_out
from bench.tiles import options
from bench.tiles.compile import pass_launches
from bench.tiles.report import Kernel, kernels
from bench.tiles.roofline import Machine
from bench.tiles.search import KERNELS, PASSES, Finding, Task, findings
from bench.tiles.verify import SHAPES

BLOCKS = 16, 32, 64, 128, 256
MAPS = 16  # in a batch of the shipped kernels: enough to fill a GPU
MARKERS = {"forward": "o", "group": "o", "queries": "^", "keys": "s", "pairs": "D"}  # of kernels, by the last word


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_problem(parser)
    what = "the kernel whose tiles are drawn (default: the pass's first)"
    parser.add_argument("--step", choices=list(KERNELS), help=what)
    add_out(parser, "the PNGs")
    options.add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    gpu, console = options.machine(args), records.console(options.WIDTH)
    task = Task(gpu, options.problem(args), args.step or PASSES[args.pass_][0])
    if not (shipped := task.shipped()):
        raise argparse.ArgumentError(None, f"no tile of {task.step} is shipped for {task.problem}")
    grid = (shipped[0]._replace(block_m=m, block_n=n) for m in BLOCKS for n in BLOCKS)
    tiles = [tile for tile in grid if task.clipped(tile) == tile and task.may_fit(tile)]

    def save(figure: Figure, name: str) -> None:
        path = args.out / f"{name}-{args.target}.png"
        figure.savefig(path, dpi=130)
        console.print(f"Wrote {path}")

    args.out.mkdir(parents=True, exist_ok=True)
    with options.compilers(args) as binaries, options.progress(console) as bar:
        binaries.advance = partial(bar.advance, bar.add_task("tiles", total=len(tiles)))
        save(draw_tiles(task, findings(task, tiles, binaries)), "tiles")
        launches = [launch for problem in SHAPES.values() for pass_ in PASSES
                    for launch in pass_launches(args.target, replace(problem, maps=MAPS), pass_)]  # fmt: skip
        line = bar.add_task("shipped kernels", total=len({launch.key for launch in launches}))
        binaries.advance = partial(bar.advance, line)
        save(draw_roofline(kernels(launches, gpu, binaries), gpu), "roofline")


def draw_tiles(task: Task, found: Sequence[Finding]) -> Figure:
    """Three maps over the blocks of queries (down) and keys (across); what does not fit or is not sound is marked."""
    titles = "registers of a thread", "programs of a multiprocessor", "PREDICTED us"
    figure = Figure(figsize=(14, 5.2), layout="constrained")
    panels, values = figure.subplots(1, 3), np.full((3, len(BLOCKS), len(BLOCKS)), np.nan)
    for finding in found:
        binary, prediction = finding.binary, finding.prediction
        i, j = BLOCKS.index(finding.tile.block_m), BLOCKS.index(finding.tile.block_n)
        if binary is not None:
            values[:2, i, j] = binary.registers, binary.programs
        if prediction is not None:
            values[2, i, j] = 1e6 * prediction.seconds
        for panel, value in zip(panels, values[:, i, j], strict=True):
            text = "" if np.isnan(value) else f"{value:.0f}{'*' * bool(finding.offences)}"
            panel.text(j, i, text, ha="center", va="center", bbox={"color": "white", "alpha": 0.7, "pad": 2})
    for panel, title, shown in zip(panels, titles, values, strict=True):
        panel.imshow(np.log(np.maximum(shown, 1)), cmap="viridis")
        panel.set(title=title, xlabel="keys of a block", ylabel="queries of a block")
        panel.set_xticks(range(len(BLOCKS)), BLOCKS)
        panel.set_yticks(range(len(BLOCKS)), BLOCKS)
    tile = found[0].tile if found else None
    rest = f"chunks {tile.block_k} and {tile.block_v}, {tile.num_warps} warps, {tile.num_stages} stages" if tile else ""
    marks = "empty: larger than the group, or cannot fit; *: spills, or loads narrowly"
    figure.suptitle(f"{task.step} on {task.gpu.name}: {task.problem}; {rest}\n{marks}")
    return figure


def draw_roofline(kernels: Sequence[Kernel], gpu: Machine) -> Figure:
    """FLOP/s over FLOPs a byte of DRAM, log-log: the roofs of DRAM and of matrix units, and a point a kernel."""

    def reached(kernel: Kernel) -> float:
        return kernel.prediction.work.flops / kernel.prediction.seconds / 1e12

    figure = Figure(figsize=(16, 8), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    peak, lowest = gpu.matrix["16-bit"] / 1e12, 0.8 * min(map(reached, kernels))
    intensity = np.geomspace(8, 2e4, 200)
    line = {"arrowstyle": "-", "color": "0.75", "linewidth": 0.6, "relpos": (0, 0.5)}
    for panel, pass_ in zip(panels, PASSES, strict=True):
        panel.loglog(intensity, np.minimum(peak, intensity * gpu.dram / 1e12), color="black")
        shown = sorted((k for k in kernels if k.launch.name.startswith(pass_)), key=reached)
        for kernel, height in zip(shown, np.geomspace(lowest, peak, len(shown)), strict=True):
            launch, work, step = kernel.launch, kernel.prediction.work, kernel.launch.label.removeprefix("backward_")
            at = work.flops / work.distinct, reached(kernel)
            panel.scatter(*at, marker=MARKERS[launch.name.split("_")[-2]], color="#0072B2", zorder=3)
            label = f"{launch.problem.name}{'' if step == pass_ else f', {step}'}, {kernel.prediction.bound}"
            panel.annotate(label, at, (3e4, height), fontsize=8, va="center", annotation_clip=False, arrowprops=line)
        panel.set(title=pass_, xlabel="FLOPs of a tile's products for each byte that must move")
        panel.grid(which="both", alpha=0.2)
    panels[0].set_ylabel("TFLOP/s")
    roofs = f"{gpu.dram / 1e12:.2f} TB/s of DRAM, {peak:.0f} TFLOP/s of matrix units"
    figure.suptitle(f"shipped kernels on {gpu.name}, bf16, {MAPS} maps, PREDICTED, and what binds each; roofs: {roofs}")
    return figure
