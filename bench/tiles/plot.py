"""Draw the tiles of one problem, and the problem under the roofline of a GPU. Times are PREDICTED.

tiles-TARGET.png: over blocks of queries and keys the registers per thread, the CTAs per SM and the predicted time.
roofline-TARGET.png: what the kernels of the pass reach, beside the passes of networks that people run, over the
products that they do for a byte; and how high the exponentials that the pass takes let it come.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from bench.arguments import add_out
from bench.terminal import Terminal
from bench.tiles import options
from bench.tiles.compile import PASSES, STEPS
from bench.tiles.report import Kernel, Pass
from bench.tiles.search import Finding, Task, findings
from bench.tiles.verify import SHAPES
from isa_triton.tiles import Tile

BLOCKS = 16, 32, 64, 128, 256
MAPS = 16  # in a batch of the shapes: enough to fill a GPU
MINE, OTHERS = "#D55E00", "#0072B2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_problem(parser)
    what = "the kernel whose tiles are drawn (default: the pass's first)"
    parser.add_argument("--step", choices=STEPS, help=what)
    add_out(parser, "the PNGs")
    options.add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    gpu, problem, said = options.machine(args), options.problem(args), Terminal(args)
    task = Task(gpu, problem, args.step or PASSES[args.pass_][0])
    tiles = space(task)
    paths = [args.out / f"{name}-{gpu.target}.png" for name in ("tiles", "roofline")]
    args.out.mkdir(parents=True, exist_ok=True)
    said.say(f"Draws {' and '.join(map(str, paths))}")
    with options.compilers(args, said) as binaries:
        draw_tiles(task, findings(task, tiles, binaries)).savefig(paths[0], dpi=130)
        mine, *others = (
            Pass.shipped(shape, args.pass_, gpu, binaries)
            for shape in (problem, *(replace(shape, maps=MAPS, dtype=problem.dtype) for shape in SHAPES.values()))
        )
        draw_roofline(mine, others).savefig(paths[1], dpi=130)
    said.end(mine.summary, *paths)


def space(task: Task) -> list[Tile]:
    """Tiles of all `BLOCKS`, the rest as shipped, as far as they may fit."""
    if not (shipped := task.shipped()):
        raise argparse.ArgumentError(None, f"no tile of {task.step} is shipped for {task.problem}")
    chunks = task.clipped(shipped[0])
    grid = (chunks._replace(block_m=m, block_n=n) for m in BLOCKS for n in BLOCKS)
    return [tile for tile in grid if task.clipped(tile) == tile and task.may_fit(tile)]


def draw_tiles(task: Task, found: Sequence[Finding]) -> Figure:
    """Three maps over the blocks of queries (down) and keys (across); what does not fit or is not sound is marked."""
    titles = "registers per thread", "CTAs per SM", "PREDICTED us"
    figure = Figure(figsize=(14, 5.2), layout="constrained")
    panels, values = figure.subplots(1, 3), np.full((3, len(BLOCKS), len(BLOCKS)), np.nan)
    for finding in found:
        binary, prediction = finding.binary, finding.prediction
        i, j = BLOCKS.index(finding.tile.block_m), BLOCKS.index(finding.tile.block_n)
        if binary is not None:
            values[:2, i, j] = binary.registers, binary.ctas_per_sm
        if prediction is not None:
            values[2, i, j] = 1e6 * prediction.seconds
        for panel, value in zip(panels, values[:, i, j], strict=True):
            text = "" if np.isnan(value) else f"{value:.0f}{'*' * bool(finding.violations)}"
            panel.text(j, i, text, ha="center", va="center", bbox={"color": "white", "alpha": 0.7, "pad": 2})
    for panel, title, shown in zip(panels, titles, values, strict=True):
        panel.imshow(np.log(np.maximum(shown, 1)), cmap="viridis")
        panel.set(title=title, xlabel="BLOCK_N", ylabel="BLOCK_M")
        panel.set_xticks(range(len(BLOCKS)), BLOCKS)
        panel.set_yticks(range(len(BLOCKS)), BLOCKS)
    tile = found[0].tile if found else None
    rest = ""
    if tile:
        rest = f"BLOCK_K={tile.block_k},BLOCK_V={tile.block_v},num_warps={tile.num_warps},num_stages={tile.num_stages}"
    marks = "empty: larger than the group, or cannot fit; *: has a violation"
    figure.suptitle(f"{task.step} on {task.gpu.name}: {task.problem}\n{rest}; {marks}")
    return figure


def draw_roofline(mine: Pass, others: Sequence[Pass]) -> Figure:
    """FLOP/s over FLOPs a byte, log-log: roofs, a point for each kernel of a pass, and one for each other pass.

    A kernel is drawn twice, over the bytes that DRAM must move and, hollow, over those that it asks L2 for.
    """
    gpu, dtype = mine.gpu, mine.problem.dtype
    figure = Figure(figsize=(12, 8), layout="constrained")
    panel = figure.subplots()
    peak, intensity = gpu.flops(dtype) / 1e12, np.geomspace(8, 1e4, 200)
    panel.loglog(intensity, np.minimum(peak, intensity * gpu.dram / 1e12), color="black", label="DRAM, matrix units")
    panel.loglog(intensity, np.minimum(peak, intensity * gpu.l2 / 1e12), color="black", linestyle="--", label="L2")
    special = sum(kernel.prediction.busy["special"] for kernel in mine.kernels)
    if special:
        roof = sum(kernel.prediction.work.flops for kernel in mine.kernels) / special / 1e12
        panel.axhline(roof, color=MINE, linestyle=":", label="exponentials (MUFU) of this pass")

    labels = list[tuple[float, float, str, str]]()  # TFLOP/s, FLOPs a byte, text, colour
    for kernel in mine.kernels:
        y, work = _reached([kernel]), kernel.prediction.work
        of_dram, of_l2 = work.flops / work.distinct, work.flops / work.bytes
        panel.plot([of_l2, of_dram], [y, y], marker="o", markersize=8, markerfacecolor="white", color=MINE)
        panel.scatter([of_dram], [y], s=70, color=MINE, zorder=4)
        labels.append((y, of_dram, f"this {kernel.launch.label}, {kernel.prediction.bound}", MINE))
    for other in others:
        works = [kernel.prediction.work for kernel in other.kernels]
        y, of_dram = _reached(other.kernels), sum(w.flops for w in works) / sum(w.distinct for w in works)
        panel.scatter([of_dram], [y], s=30, color=OTHERS, zorder=3)
        slowest = max(other.kernels, key=lambda kernel: kernel.prediction.seconds)
        labels.append((y, of_dram, f"{other.problem.name}, {slowest.prediction.bound}", OTHERS))
    bottom, top = 0.6 * min(labels)[0], 1.6 * peak
    line = {"arrowstyle": "-", "color": "0.75", "linewidth": 0.6, "relpos": (0, 0.5)}
    for (y, x, text, color), height in zip(sorted(labels), np.linspace(0.02, 0.98, len(labels)), strict=True):
        right = 1.02, height  # of the panel, one below the other, whatever the points are
        panel.annotate(text, (x, y), right, textcoords="axes fraction", va="center", color=color, annotation_clip=False,
                       arrowprops=line)  # fmt: skip
    bytes_ = "of DRAM that must move (filled), asked of L2 (hollow)"
    panel.set(
        xlim=intensity[[0, -1]], ylim=(bottom, top), ylabel="TFLOP/s", xlabel=f"FLOPs of products a byte {bytes_}"
    )
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter("{x:g}")
    panel.grid(which="both", alpha=0.2)
    panel.legend(loc="upper left")
    blue = f"blue: what tiles verify looks at, {MAPS} maps, {dtype}; beside a name, what binds it"
    panel.set_title(f"PREDICTED {mine.name} on {gpu.name}: {mine.problem}\n{blue}")
    return figure


def _reached(kernels: Sequence[Kernel]) -> float:
    """TFLOP/s of kernels one after another."""
    flops = sum(kernel.prediction.work.flops for kernel in kernels)
    return flops / sum(kernel.prediction.seconds for kernel in kernels) / 1e12
