"""Plots of results: each reads rows, as a CSV holds them, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
import torch

from bench import workload
from bench.records import format_size, short
from bench.workload import BLOCK_LEVELS, LEVELS, OURS, PASSES, QUANTITIES, Cost, Quantity

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend without a display
from matplotlib.ticker import NullLocator

if TYPE_CHECKING:
    from bench import check, sharding


class Look(NamedTuple):
    """How a provider is drawn."""

    title: str
    colour: str
    marker: str = "o"
    line: str = "-"  # others have hollow markers


LOOKS = {
    "dense": Look("dense (non-local, scores in memory)", "#D55E00"),
    "dense-sdpa": Look("dense-sdpa (the same, by torch's scaled_dot_product_attention)", "#E69F00", "s", "--"),
    "nonlocal": Look("nonlocal (the non-local block)", "#8C510A", "p", ":"),
    "nonlocal-triton": Look("nonlocal-triton (the same, our kernels on a GPU)", "#BF812D", "P", "--"),
    "sa": Look("sa (Base-OC, the authors' dense baseline)", "#5E3C08", "h", "-."),
    "rcca": Look("rcca (criss-cross, twice)", "#CC79A7", "X", ":"),
    "rcca-triton": Look("rcca-triton (the same, our kernels on a GPU)", "#882255", "d", "--"),
    "cgnl": Look("cgnl (linear, no softmax)", "#000000", "*", "-."),
    "cgnlx": Look("cgnlx (cgnl, expanded to third order)", "#666666", "*", ":"),
    "ppm": Look("ppm (pyramid pooling)", "#999933", "<", "-."),
    "aspp": Look("aspp (dilated convolutions)", "#AAAA00", ">", "-."),
    "timm": Look("timm (MaxViT's grid and block attention)", "#332288", "H", ":"),
    "flex": Look("flex (FlexAttention, masked)", "#117733", "8", ":"),
    "natten": Look("natten (dilated and strided neighbourhoods)", "#44AA99", "D", ":"),
    "unfused": Look("unfused (ISA, permuted and copied)", "#56B4E9", "^", "-."),
    "isa": Look("isa (ours)", "#0072B2", "D"),
    "isa-triton": Look("isa-triton (ours on a GPU)", "#009E73", "v", "--"),
}
STAGE_LOOKS = {
    "long-short": Look("long, then short range", "#0072B2", "D"),
    "short-long": Look("short, then long range", "#E69F00", "s", "--"),
    "long": Look("long range alone", "#AA4499", "^", "-."),
    "short": Look("short range alone", "#009E73", "v", ":"),
}
BAND: dict[str, Any] = {"linewidth": 8, "alpha": 0.2, "zorder": 1}  # of a closed form, beneath the points
LEVEL_TITLES = {
    "attention": "attention alone (q, k, v → context)",
    "module": "whole block with its projections",
    "head": "whole segmentation head",
}
PASS_TITLES = {"forward": "forward", "training": "forward + backward"}


@contextmanager
def _saved(path: Path, rows: int, columns: int, dpi: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure of rows x columns panels, written to a PNG when it is drawn."""
    figure, panels = plt.subplots(rows, columns, squeeze=False, layout="constrained", **options)
    try:
        yield figure, panels
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=dpi)
    finally:
        plt.close(figure)


def _draw_lines(
    panel: Any, rows: Sequence[Cost], quantity: Quantity, x: Callable[[Cost], float], looks: Mapping[str, Look]
) -> None:
    """A line a provider over x; equal costs lie on one another, and the larger hollow marker stays visible."""
    for name in dict.fromkeys(row.provider for row in rows if row.provider in looks):
        mine, (title, colour, marker, line) = [row for row in rows if row.provider == name], looks[name]
        if points := sorted((x(row), value) for row in mine if (value := quantity.of(row)) is not None):
            size, face = (6, colour) if line == "-" else (10, "none")
            style = {"color": colour, "marker": marker, "linestyle": line, "label": title}
            panel.plot(*zip(*points, strict=True), markersize=size, markerfacecolor=face, **style)


def _legend(figure: Any, panels: Any) -> None:
    """One below all panels, with every label once."""
    entries = [entry for panel in panels.flat for entry in zip(*panel.get_legend_handles_labels(), strict=True)]
    lines = {label: line for line, label in entries}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=10)


def _widths(row: Cost) -> str:
    return f"C={row.channels}, K={row.key_channels}, V={row.value_channels}, {row.dtype}"


# -- costs over the size of the map ------------------------------------------------------------------------------------


def scaling(rows: Sequence[Cost], quantity: Quantity, path: Path) -> None:
    """Draw one quantity over the number of pixels, log-log, a panel for each level and pass, a line a provider.

    Args:
        rows: what a CSV held.
        quantity: what is drawn.
        path: the PNG to write.
    """
    levels = [level for level in LEVELS if any(row.level == level for row in rows)]
    passes = [pass_ for pass_ in PASSES if any(row.pass_ == pass_ for row in rows)]
    size = (1 + 6 * len(levels), 1.8 + 4.2 * len(passes))
    how = f"measured on {rows[0].device}" if quantity.column == "seconds" else "counted on fake tensors"
    with _saved(path, len(passes), len(levels), 130, figsize=size, sharex=True, sharey=True) as (figure, panels):
        for panel, (pass_, level) in zip(panels.flat, product(passes, levels), strict=True):
            _draw_scaling(panel, [row for row in rows if row.panel == (level, pass_)], quantity)
            panel.set_title(f"{LEVEL_TITLES[level]}, {PASS_TITLES[pass_]}", fontsize=11)
            panel.tick_params(labelbottom=True, labelleft=True)
        for panel in panels[:, 0]:
            panel.set_ylabel(f"{quantity.title} [{quantity.unit}]")
        for panel in panels[-1]:
            panel.set_xlabel("map, height x width (axis: number of pixels)")
        _legend(figure, panels)
        figure.suptitle(f"{quantity.title} of attention over a feature map ({_widths(rows[0])}; {how})", fontsize=13)


def _draw_scaling(panel: Any, rows: Sequence[Cost], quantity: Quantity) -> None:
    panel.set(xscale="log", yscale="log")
    sizes = {row.pixels: row.size for row in sorted(rows, key=lambda row: row.pixels)}
    if rows and rows[0].level == "attention":
        _draw_closed_form(panel, rows[0], np.geomspace(min(sizes), max(sizes), 200), quantity)
    _draw_lines(panel, rows, quantity, lambda row: row.pixels, LOOKS)
    _draw_ratios(panel, rows, quantity)
    ticks = _apart(list(sizes), 1.6)
    panel.set_xticks(ticks, [format_size(sizes[tick]) for tick in ticks], fontsize=8)
    panel.minorticks_off()
    panel.grid(color="0.92")
    panel.set_axisbelow(True)


def _draw_closed_form(panel: Any, row: Cost, pixels: Any, quantity: Quantity) -> None:
    """The paper's formulas. There is none for time."""
    for name, size, keys in (("dense", None, "HW"), (OURS, row.window, "HW/P_hP_w + P_hP_w")):
        if quantity.column == "flops":
            values = workload.closed_form_flops(pixels, row.key_channels, row.value_channels, row.pass_, size)
            label = f"closed form, $2\\,(K+V)\\,HW\\,n,\\ \\ n = {keys}$"
        elif quantity.column == "peak_bytes":
            values = workload.closed_form_score_bytes(pixels, getattr(torch, row.dtype).itemsize, size)
            label = f"one copy of the scores, $HW\\,n,\\ \\ n = {keys}$"
        else:
            return
        panel.plot(pixels, values / quantity.scale, color=LOOKS[name].colour, label=label, **BAND)


def _draw_ratios(panel: Any, rows: Sequence[Cost], quantity: Quantity) -> None:
    """An arrow from ours up to dense with their ratio, at sizes far enough apart to be read."""
    known = {(row.provider, row.pixels): value for row in rows if (value := quantity.of(row)) is not None}
    both = sorted(pixels for name, pixels in known if name == OURS and ("dense", pixels) in known)
    for pixels in _apart(both, 3.5):
        low, high = known[OURS, pixels], known["dense", pixels]
        if high / low >= 2:  # closer lines leave no room
            style = {"arrowstyle": "<->", "color": "0.45", "linewidth": 0.8, "shrinkA": 4, "shrinkB": 4}
            panel.annotate("", (pixels, high), (pixels, low), arrowprops=style)
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
            middle = (low * high) ** 0.5
            panel.text(pixels, middle, f"{short(high / low)}x", ha="center", va="center", fontsize=10, bbox=box)


def _apart(values: Sequence[int], factor: float) -> list[int]:
    """Those of the ascending values that are at least `factor` times the one kept before."""
    kept: list[int] = []
    for value in values:
        if not kept or value >= factor * kept[-1]:
            kept.append(value)
    return kept


# -- costs over the partition size -------------------------------------------------------------------------------------


def partition_sizes(rows: Sequence[Cost], window: tuple[int, int], path: Path) -> None:
    """Draw a pass: each quantity against the partition size at both levels, and bars of the blocks at one size."""
    with _saved(path, 3, 3, 110, figsize=(16, 13), height_ratios=(1, 1, 0.9)) as (figure, panels):
        for panel, (level, quantity) in zip(panels[:2].flat, product(BLOCK_LEVELS, QUANTITIES), strict=True):
            _draw_sizes(panel, [row for row in rows if row.level == level], quantity)
            panel.set_title(f"{quantity.title}, {LEVEL_TITLES[level]}", fontsize=12)
        at_window = [row for row in rows if row.level == "module" and row.window == window]
        for panel, quantity in zip(panels[2], QUANTITIES, strict=True):
            _draw_bars(panel, at_window, quantity)
            panel.set_title(f"{quantity.title} of blocks and modules, P = {format_size(window)}", fontsize=12)
        _legend(figure, panels[:1, :1])
        what, how = format_size(rows[0].size), f"{PASS_TITLES[rows[0].pass_]}; {_widths(rows[0])}"
        title = f"The partition size on a map of {what} ({how}; time measured on {rows[0].device})"
        figure.suptitle(title, fontsize=14)


def _draw_sizes(panel: Any, rows: Sequence[Cost], quantity: Quantity) -> None:
    """A line a variant over the pixels of a window, and the optimum of both stages, P_h P_w = sqrt(HW)."""
    areas = {math.prod(row.window): row.partition_size for row in rows}
    row, optimum = rows[0], rows[0].pixels ** 0.5
    panel.set(xscale="log", yscale="log", xlabel="partition size (axis: pixels of a window)", ylabel=quantity.unit)
    if quantity.column == "flops" and row.level == "attention":
        grid = np.geomspace(min(areas), max(areas), 200)
        closed = workload.closed_form_flops(row.pixels, row.key_channels, row.value_channels, row.pass_, (grid, 1))
        label = "closed form, $2\\,(K+V)\\,HW\\,(HW/P_hP_w + P_hP_w)$"
        panel.plot(grid, closed / quantity.scale, color=STAGE_LOOKS["long-short"].colour, label=label, **BAND)
    _draw_lines(panel, rows, quantity, lambda row: math.prod(row.window), STAGE_LOOKS)
    panel.axvline(optimum, color="0.4", linewidth=1, linestyle=(0, (2, 2)), label="optimum, $P_hP_w = \\sqrt{HW}$")
    if quantity.column == "peak_bytes":  # hardly varies, and a logarithm would hide that
        panel.set_yscale("linear")
        panel.set_ylim(bottom=0)
    panel.set_xticks(list(areas), list(areas.values()), fontsize=9, rotation=30)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(color="0.92")


def _draw_bars(panel: Any, rows: Sequence[Cost], quantity: Quantity) -> None:
    """A bar a variant with its value beside it."""
    values = {row.provider: quantity.of(row) for row in rows}
    lengths = [value or 0.0 for value in values.values()]
    colours = [STAGE_LOOKS[name].colour if name in STAGE_LOOKS else "#999999" for name in values]
    panel.barh(list(values), lengths, color=colours, height=0.7)
    for name, value in values.items():
        panel.text(value or 0.0, name, " not run" if value is None else f" {short(value)}", va="center", fontsize=10)
    panel.invert_yaxis()
    panel.set(xlabel=quantity.unit, xlim=(0, 1.18 * max(lengths, default=1) or 1))


# -- costs over the number of devices ----------------------------------------------------------------------------------


def sharding_costs(rows: Sequence[sharding.Row], rate: float, links: Sequence[float], path: Path) -> None:
    """Draw what was run above, and below what was simulated: peak bytes, bytes sent and predicted seconds."""
    run, simulated = ([row for row in rows if row.source == source] for source in ("run", "simulated"))
    strong, weak = ([row for row in run if row.scaling == scaling] for scaling in ("strong", "weak"))
    sent = [row for row in simulated if row.devices > 1]
    drawn: tuple[tuple[list[sharding.Row], str, str, float, str], ...] = (
        (strong, "seconds", "ms", 1e-3, "strong scaling, run on this CPU with gloo"),
        (weak, "seconds", "ms", 1e-3, "weak scaling, run on this CPU with gloo"),
        (strong, "peak_bytes", "MiB", 2**20, "peak bytes of a device, run (strong)"),
        (simulated, "peak_bytes", "GiB", 2**30, "peak bytes of a device, simulated (grey: 1/N)"),
        (sent, "sent_bytes", "GiB", 2**30, "bytes a device sends, simulated (grey: 2 (N-1)/N local maps)"),
    )
    with _saved(path, 2, 3, 110, figsize=(16, 9)) as (_, panels):
        for panel, (these, column, unit, scale, title) in zip(panels.flat, drawn, strict=False):
            panel.set(title=title, ylabel=unit)
            for label in dict.fromkeys(map(_of_line, these)):
                line = [row for row in these if _of_line(row) == label]
                devices, values = [row.devices for row in line], [getattr(row, column) / scale for row in line]
                panel.plot(devices, values, "o-", label=label)
                best = {"peak_bytes": [values[0] * devices[0] / N for N in devices],
                        "sent_bytes": [row.bound_bytes / scale for row in line]}  # fmt: skip
                if column in best:
                    panel.plot(devices, best[column], color="0.8", linewidth=6, zorder=0)
        if simulated:
            largest, pass_ = max((row.size for row in simulated), key=math.prod), simulated[0].pass_
            line = [row for row in simulated if row.size == largest and row.pass_ == pass_]
            for link in links:
                times = [row.predicted(rate, link) for row in line]
                panels[1, 2].plot([row.devices for row in line], times, "o-", label=f"{link:g} GB/s")
            title = f"PREDICTED {pass_} of {format_size(largest)}, {rate:g} TFLOP/s assumed"
            panels[1, 2].set(title=title, ylabel="s")
        for panel in panels.flat:
            panel.set(xlabel="devices N")
            panel.title.set_fontsize(11)
            if panel.lines:
                panel.set_xscale("log", base=2)
                panel.set_yscale("log")
                panel.xaxis.set_major_formatter("{x:g}")
                panel.grid(color="0.92")
                panel.legend(frameon=False, fontsize=9)


def _of_line(row: sharding.Row) -> str:
    """What rows of one line share: heights grow with N where a map is run."""
    return row.pass_ if row.source == "run" else f"{format_size(row.size)} {row.pass_}"


# -- errors ------------------------------------------------------------------------------------------------------------


def error_budget(rows: Sequence[check.Row], names: Sequence[str], path: Path, floor: float = 1e-4) -> None:
    """How much of the budget was used: the median of all cases (mark) and the worst (line's end).

    Args:
        rows: what was checked.
        names: the columns of errors.
        path: the PNG to write.
        floor: no error at all is drawn here.
    """
    groups = list(dict.fromkeys((row.backend, row.dtype) for row in rows))
    with _saved(path, 1, 1, 150, figsize=(8, 4)) as (_, ((panel,),)):
        for (i, key), (j, name) in product(enumerate(groups), enumerate(names)):
            errors = [getattr(row, name) for row in rows if (row.backend, row.dtype) == key]
            if known := [max(error, floor) for error in errors if error is not None]:
                x, label = j + (i - len(groups) / 2) * 0.12, ", ".join(key) if j == 0 else None
                panel.vlines(x, median(known), max(known), colors=f"C{i}", linewidth=2)
                panel.plot(x, median(known), marker="osv^D"[i], color=f"C{i}", markersize=5, linestyle="", label=label)
        panel.axhline(1.0, color="black", linewidth=1)
        panel.set(yscale="log", ylabel="error / what the budget allows, median to worst")
        panel.set_title(f"{len(rows)} random cases against fp64")
        panel.set_xticks(range(len(names)), names)
        panel.legend(fontsize="small", ncols=2)
