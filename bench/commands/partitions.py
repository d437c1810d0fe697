"""``python -m bench partitions``: what the partition size, the order of the stages and parallel branches cost.

`long-short` and `short-long` are both stages in either order, `long` and `short` one stage alone. `module P` is the ISA
module, which fuses the context with its input, and `module P, 2P` the same with two partition sizes in parallel.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import NullLocator
from rich.console import Console
from torch import Tensor, nn

from bench import survey
from bench.arguments import check_partition_size, folder, size
from bench.providers import Attend, Provider
from bench.records import format_size, short
from bench.results import QUANTITIES, Quantity, Row
from bench.workload import BLOCK_LEVELS, PASSES, Level, Workload, closed_form_flops
from isa_triton import InterlacedSparseSelfAttention, ISAModule, Partition, SelfAttention2d, partitioned_attention

HELP = "cost against the partition size, the order and parallel sizes: partitions.csv, partition_sizes_*.png"
WINDOWS = ((2, 2), (4, 4), (8, 8), (12, 12), (16, 16), (32, 32), (64, 64))


def cascade(patterns: Sequence[str], workload: Workload) -> Attend:
    """Attention in stages: each on (q, k, the context of the one before)."""
    map_, p = (workload.height, workload.width), workload.partition_size
    partitions = {"interlaced": Partition.interlaced(map_, stride=p), "local": Partition.local(map_, window=p)}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for pattern in patterns:
            v = partitioned_attention(q, k, v, partitions[pattern])
        return v

    return attention


def block(order: str, workload: Workload) -> nn.Module:
    """Both stages with their projections."""
    widths = workload.channels, workload.key_channels, workload.value_channels
    return InterlacedSparseSelfAttention(*widths, partition_size=workload.partition_size, order=order)


def stage(pattern: str, workload: Workload) -> nn.Module:
    """One stage with its projections."""
    widths = workload.channels, workload.key_channels, workload.value_channels
    return SelfAttention2d(*widths, pattern=pattern, partition_size=workload.partition_size)


def branches(factors: Sequence[int], workload: Workload) -> nn.Module:
    """The ISA module with a branch for every factor, of so many times the partition size."""
    (P_h, P_w), channels = workload.partition_size, workload.channels
    sizes = [(P_h * factor, P_w * factor) for factor in factors]
    return ISAModule(channels, workload.key_channels, workload.value_channels, channels, partition_size=sizes)


STAGES = tuple(
    Provider(name, title, colour, marker, line, partial(cascade, patterns), module)
    for name, title, colour, marker, line, patterns, module in (
        (
            "long-short",
            "long, then short range",
            "#0072B2",
            "D",
            "-",
            ("interlaced", "local"),
            partial(block, "long-short"),
        ),
        (
            "short-long",
            "short, then long range",
            "#E69F00",
            "s",
            "--",
            ("local", "interlaced"),
            partial(block, "short-long"),
        ),
        ("long", "long range alone", "#D55E00", "^", "-.", ("interlaced",), partial(stage, "interlaced")),
        ("short", "short range alone", "#009E73", "v", ":", ("local",), partial(stage, "local")),
    )
)
MODULES = tuple(
    Provider(name, name, "#999999", "o", "-", module=partial(branches, factors))
    for name, factors in (("module P", (1,)), ("module P, 2P", (1, 2)), ("module P, 2P, 4P", (1, 2, 4)))
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=folder, default="out", metavar="DIR", help="folder of the results (default: out)")
    add("--size", type=size, default=(128, 128), metavar="SIZE", help="the map, 64 or 64x128 (default: 128)")
    add(
        "--partition-sizes",
        nargs="+",
        type=size,
        metavar="P",
        help=f"8 or 8x4, height first (default: {' '.join(map(format_size, WINDOWS))}, as far as the map has room)",
    )
    add("--partition-size", type=size, default=(8, 8), metavar="P", help="of the ISA modules (default: 8)")
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="default: both")
    survey.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    wanted = args.partition_sizes or [p for p in WINDOWS if p[0] <= args.size[0] and p[1] <= args.size[1]]
    windows = sorted({*wanted, args.partition_size}, key=lambda p: (p[0] * p[1], p))
    for window in windows:
        check_partition_size(window, args.size)
    plan: list[tuple[Workload, Sequence[Provider]]] = []
    for level, pass_, window in product(BLOCK_LEVELS, args.passes, windows):
        modules = MODULES if level == "module" and window == args.partition_size else ()
        plan.append((survey.workload(args, level, pass_, args.size, window), STAGES + modules))
    rows = survey.conduct(args, args.out / "partitions.csv", plan)
    for pass_ in args.passes:
        picture = args.out / f"partition_sizes_{pass_}.png"
        plot([row for row in rows if row.pass_ == pass_], args.partition_size, picture)
        Console().print(f"Wrote {picture}", highlight=False)


def plot(rows: Sequence[Row], window: tuple[int, int], path: Path) -> None:
    """Draw a pass: each quantity against the partition size at both levels, and bars of the blocks at one size."""
    figure, axes = plt.subplots(3, 3, figsize=(16, 13), layout="constrained", height_ratios=(1, 1, 0.9))
    for (i, level), (j, quantity) in product(enumerate(BLOCK_LEVELS), enumerate(QUANTITIES)):
        draw_sizes(axes[i, j], [row for row in rows if row.level == level], quantity)
        axes[i, j].set_title(f"{quantity.title}, {_TITLES[level]}", fontsize=12)
        axes[i, j].set_ylabel(quantity.unit)
    at_window = [row for row in rows if row.level == "module" and row.window == window]
    for panel, quantity in zip(axes[2], QUANTITIES, strict=True):
        draw_bars(panel, at_window, quantity)
        panel.set_title(f"{quantity.title} of blocks and modules, P = {format_size(window)}", fontsize=12)
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    row = rows[0]
    widths = f"C={row.channels}, K={row.key_channels}, V={row.value_channels}, {row.dtype}"
    doing = "forward" if row.pass_ == "forward" else "forward + backward"
    figure.suptitle(
        f"The partition size on a map of {format_size(row.map)} ({doing}; {widths}; time measured on {row.device})",
        fontsize=14,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


_TITLES: dict[Level, str] = {"attention": "attention alone", "module": "block with its projections"}


def draw_sizes(panel: Any, rows: Sequence[Row], quantity: Quantity) -> None:
    """A line a variant over the pixels of a window, and the optimum of both stages, P_h P_w = sqrt(HW)."""
    areas = {row.window[0] * row.window[1]: row.partition_size for row in rows}
    row, optimum = rows[0], rows[0].pixels ** 0.5
    panel.set(xscale="log", yscale="log", xlabel="partition size (axis: pixels of a window)")
    if quantity.column == "flops" and row.level == "attention":
        grid = np.geomspace(min(areas), max(areas), 200)
        closed = closed_form_flops(row.pixels, row.key_channels, row.value_channels, row.pass_, (grid, 1))
        formula = "closed form, $2\\,(K+V)\\,HW\\,(HW/P_hP_w + P_hP_w)$"
        panel.plot(grid, closed / quantity.scale, color=STAGES[0].colour, linewidth=8, alpha=0.2, label=formula)
    for variant in STAGES:
        points = [(row.window[0] * row.window[1], quantity.of(row)) for row in rows if row.provider == variant.name]
        drawn = [point for point in points if point[1] is not None]
        if drawn:
            filled = variant.line == "-"
            panel.plot(
                *zip(*drawn, strict=True),
                color=variant.colour,
                marker=variant.marker,
                linestyle=variant.line,
                markersize=6 if filled else 9,
                markerfacecolor=variant.colour if filled else "none",
                label=variant.title,
            )
    panel.axvline(optimum, color="0.4", linewidth=1, linestyle=(0, (2, 2)), label="optimum, $P_hP_w = \\sqrt{HW}$")
    if quantity.column == "peak_bytes":  # hardly varies, and a logarithm would hide that
        panel.set_yscale("linear")
        panel.set_ylim(bottom=0)
    panel.set_xticks(list(areas), list(areas.values()), fontsize=9, rotation=30)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(color="0.92")


def draw_bars(panel: Any, rows: Sequence[Row], quantity: Quantity) -> None:
    """A bar a variant with its value beside it."""
    variants = {variant.name: variant for variant in STAGES + MODULES}
    values = [quantity.of(row) for row in rows]
    names = [row.provider for row in rows]
    heights = [0.0 if value is None else value for value in values]
    panel.barh(names, heights, color=[variants[name].colour for name in names], height=0.7)
    for name, value in zip(names, values, strict=True):
        panel.text(value or 0.0, name, " not run" if value is None else f" {short(value)}", va="center", fontsize=10)
    panel.invert_yaxis()
    panel.set(xlabel=quantity.unit, xlim=(0, 1.18 * max(heights, default=1) or 1))
