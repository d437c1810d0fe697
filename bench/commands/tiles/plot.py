"""Draw the tiles of one problem, and the shipped kernels under the roofline of a GPU. Times are PREDICTED.

tiles-TARGET.png: over blocks of queries and keys the registers, the programs at a time and the predicted time.
roofline-TARGET.png: what shipped kernels are predicted to reach, over the products that they do a byte.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from rich.progress import Progress, TaskID

from bench.arguments import folder
from bench.commands.tiles.common import (
    add_compilers,
    add_machine,
    add_problem,
    compilers,
    describe,
    machine,
    problem,
    progress,
    wide_console,
)
from bench.tiles.passes import Kernel, kernel, pass_launches
from bench.tiles.roofline import Machine
from bench.tiles.search import KERNELS, PASSES, Finding, Searcher, Task
from bench.tiles.verify import SHAPES, Case, Verifier, verify

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend without a display

HELP = "the tile space of a problem, and the roofline with the shipped kernels on it"
BLOCKS = 16, 32, 64, 128, 256
MAPS = 16  # in a batch of the shipped kernels: enough to fill a GPU
MARKERS = {"forward": "o", "group": "o", "queries": "^", "keys": "s", "pairs": "D"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_machine(parser)
    add_problem(parser)
    add = parser.add_argument
    add("--step", choices=list(KERNELS), help="the kernel whose tiles are drawn (default: the pass's first)")
    add("--out", type=folder, default="out", metavar="DIR", help="folder of the PNGs (default: out)")
    add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    gpu, console = machine(args), wide_console()
    task = Task(args.target, problem(args), args.step or PASSES[args.pass_][0])
    if not (shipped := task.shipped()):
        raise argparse.ArgumentError(None, f"no tile of {task.step} is shipped for {describe(task.problem)}")
    tile = shipped[0]
    grid = {(m, n): tile._replace(block_m=m, block_n=n) for m in BLOCKS for n in BLOCKS}
    square = {t: t for t in (tile._replace(block_m=b, block_n=b) for b in BLOCKS)} if task.step == "group" else grid
    wanted = [t for t in dict.fromkeys(square.values()) if task.clipped(t) == t and task.may_fit(t)]
    verifier = Verifier(args.cache)
    with compilers(args.jobs) as pool, progress(console) as bar:
        line = bar.add_task("tiles", total=len(wanted))
        found = Searcher(verifier, pool, gpu, partial(_advance, bar, line)).findings(task, wanted)
        problems = {shape.name: replace(shape.problem("bfloat16"), maps=MAPS) for shape in SHAPES}
        launches = [(name, pass_, launch) for name, wanted_ in problems.items() for pass_ in ("forward", "backward")
                    for launch in pass_launches(args.target, wanted_, pass_)]  # fmt: skip
        line = bar.add_task("shipped kernels", total=len({launch.key for _, _, launch in launches}))
        cases = [Case(args.target, name, problems[name], launch) for name, _, launch in launches]
        verify(verifier, cases, args.jobs, lambda: bar.advance(line))
    kernels = [(name, pass_, kernel(launch, problems[name], gpu, verifier)) for name, pass_, launch in launches]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in (("tiles", draw_tiles(task, found, gpu)), ("roofline", draw_roofline(kernels, gpu))):
        path = args.out / f"{name}-{args.target}.png"
        figure.savefig(path, dpi=130)
        plt.close(figure)
        console.print(f"Wrote {path}", highlight=False)


def _advance(bar: Progress, line: TaskID, _: Finding) -> None:
    bar.advance(line)


def draw_tiles(task: Task, found: Sequence[Finding], gpu: Machine) -> Any:
    """Three maps over the blocks of queries (down) and keys (across); what does not fit or is not sound is marked."""
    quantities: tuple[tuple[str, Any], ...] = (
        ("registers of a thread", lambda f: f.binary and f.binary.registers),
        ("programs of a multiprocessor", lambda f: f.binary and f.binary.programs),
        ("PREDICTED us", lambda f: f.prediction and 1e6 * f.prediction.seconds),
    )
    by_block = {(finding.tile.block_m, finding.tile.block_n): finding for finding in found}
    figure, panels = plt.subplots(1, 3, figsize=(14, 5.2), layout="constrained")
    for panel, (title, of) in zip(panels, quantities, strict=True):
        values = np.full((len(BLOCKS), len(BLOCKS)), np.nan)
        for i, m in enumerate(BLOCKS):
            for j, n in enumerate(BLOCKS):
                finding = by_block.get((m, n))
                value = of(finding) if finding else None
                if finding is None or value is None:
                    continue
                values[i, j] = value
                text = f"{value:.0f}{'*' * bool(finding.offences)}"
                panel.text(j, i, text, ha="center", va="center", bbox={"color": "white", "alpha": 0.7, "pad": 2})
        panel.imshow(np.log(np.maximum(values, 1)), cmap="viridis")
        panel.set(title=title, xlabel="keys of a block", ylabel="queries of a block")
        panel.set_xticks(range(len(BLOCKS)), BLOCKS)
        panel.set_yticks(range(len(BLOCKS)), BLOCKS)
    tile = found[0].tile if found else None
    rest = f"chunks {tile.block_k} and {tile.block_v}, {tile.num_warps} warps, {tile.num_stages} stages" if tile else ""
    figure.suptitle(
        f"{task.step} on {gpu.name}: {describe(task.problem)}; {rest}\nempty: larger than the group, or cannot fit; "
        "*: spills, or loads narrowly"
    )
    return figure


def draw_roofline(kernels: Sequence[tuple[str, str, Kernel]], gpu: Machine) -> Any:
    """FLOP/s over FLOPs a byte of DRAM, log-log: the roofs of DRAM and of matrix units, and a point a kernel."""

    def reached(kernel: Kernel) -> float:
        return kernel.prediction.work.flops / kernel.prediction.seconds / 1e12

    figure, panels = plt.subplots(1, 2, figsize=(16, 8), layout="constrained", sharex=True, sharey=True)
    peak, lowest = gpu.matrix["16-bit"] / 1e12, 0.8 * min(reached(kernel) for _, _, kernel in kernels)
    intensity = np.geomspace(8, 2e4, 200)
    line = {"arrowstyle": "-", "color": "0.75", "linewidth": 0.6, "relpos": (0, 0.5)}
    for panel, pass_ in zip(panels, ("forward", "backward"), strict=True):
        panel.loglog(intensity, np.minimum(peak, intensity * gpu.dram / 1e12), color="black")
        shown = sorted(((name, k) for name, which, k in kernels if which == pass_), key=lambda pair: reached(pair[1]))
        for (name, k), height in zip(shown, np.geomspace(lowest, peak, len(shown)), strict=True):
            step, at = (
                k.name.removeprefix("backward_"),
                (k.prediction.work.flops / k.prediction.work.distinct, reached(k)),
            )
            panel.scatter(*at, marker=MARKERS[step.split(":")[0]], color="#0072B2", zorder=3)
            label = f"{name}{'' if step == pass_ else f', {step}'}, {k.prediction.bound}"
            panel.annotate(label, at, (3e4, height), fontsize=8, va="center", annotation_clip=False, arrowprops=line)
        panel.set(title=pass_, xlabel="FLOPs of a tile's products for each byte that must move")
        panel.grid(which="both", alpha=0.2)
    panels[0].set_ylabel("TFLOP/s")
    figure.suptitle(
        f"shipped kernels on {gpu.name}, bf16, {MAPS} maps, PREDICTED, and what binds each; roofs: "
        f"{gpu.dram / 1e12:.2f} TB/s of DRAM, {peak:.0f} TFLOP/s of matrix units"
    )
    return figure
