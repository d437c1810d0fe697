"""Plots of results: each reads rows, as a CSV holds them, and nothing else."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
import torch

from bench import workload
from bench.records import format_size, short
from bench.workload import ALLOCATED, BLOCK_LEVELS, LEVELS, OURS, PASSES, QUANTITIES, Cost, Quantity

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend without a display
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

if TYPE_CHECKING:
    from bench import check, sharding
    from bench.models import memory


class Look(NamedTuple):
    """How a provider is drawn."""

    title: str
    colour: str
    marker: str = "o"
    line: str = "-"  # others have hollow markers


LOOKS = {
    "dense": Look("dense (non-local, scores in memory)", "#D55E00"),
    "dense-sdpa": Look("dense-sdpa (the same, fused: torch's sdpa)", "#E69F00", "s", "--"),
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
    "unfused-compiled": Look("unfused-compiled (the same under torch.compile)", "#56B4E9", "P", "--"),
    "isa": Look("isa (ours)", "#0072B2", "D"),
    "isa-compiled": Look("isa-compiled (the same under torch.compile)", "#0072B2", "X", "--"),
    "isa-triton": Look("isa-triton (ours on a GPU)", "#009E73", "v", "--"),
}
STAGE_LOOKS = {
    "long-short": Look("long, then short range", "#0072B2", "D"),
    "short-long": Look("short, then long range", "#88CCEE", "s", "--"),
    "long": Look("long range alone", "#AA4499", "^", "-."),
    "short": Look("short range alone", "#B8860B", "v", ":"),
}
DEVICE_LOOKS = tuple(LOOKS[name] for name in ("isa", "dense-sdpa", "isa-triton", "dense"))  # distinct, no more
FUSED = "dense-sdpa"  # dense attention that keeps no scores
HEADLINE = ("dense", FUSED, "rcca", OURS)  # who is in the figure of one panel
MAPS = {2: "map, height x width (axis: number of pixels)", 3: "volume, depth x height x width (axis: number of voxels)"}
DOUBTFUL: dict[str, Any] = {
    "linestyle": "", "marker": "o", "markersize": 16, "markerfacecolor": "none", "markeredgecolor": "0.5",
    "label": "doubtful (why: note in the CSV)",
}  # fmt: skip
NOT_RUN: dict[str, Any] = {
    "linestyle": "", "marker": "x", "markersize": 6, "label": "not run (why: note in the CSV)"
}  # fmt: skip
ON_DEVICE: dict[str, Any] = {
    "linestyle": "", "marker": "+", "markersize": 12, "label": "allocated by the device, beside what is counted"
}  # fmt: skip
MARKERS = "osv^D<>p"  # a group each, and again from the first
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
    """A line a provider over x, ours on top; equal costs lie on one another, and the larger hollow markers show.

    Doubtful seconds are ringed, and what was not run has a cross at the top, a row of them a provider.
    """
    high = 1.0
    for name, (title, colour, marker, line) in looks.items():
        mine = sorted((row for row in rows if row.provider == name), key=x)
        points = [(x(row), value) for row in mine if (value := quantity.of(row)) is not None]
        if not points:
            continue
        size, face, top = (6, colour, 4) if line == "-" else (10, "none", 3)
        style = {"color": colour, "marker": marker, "linestyle": line, "label": title, "zorder": top}
        panel.plot(*zip(*points, strict=True), markersize=size, markerfacecolor=face, **style)
        allocated = [(x(row), value) for row in mine if (value := ALLOCATED.of(row)) is not None]
        if quantity.column == "peak_bytes" and allocated:
            panel.plot(*zip(*allocated, strict=True), color=colour, **ON_DEVICE)
        if quantity.column != "seconds":
            continue
        if doubtful := [(x(row), quantity.of(row)) for row in mine if row.doubtful]:
            panel.plot(*zip(*doubtful, strict=True), **DOUBTFUL)
        if missing := [x(row) for row in mine if row.seconds is None]:
            high -= 0.035
            panel.plot(missing, [high] * len(missing), color=colour, transform=panel.get_xaxis_transform(), **NOT_RUN)
    if high < 1:  # room for the crosses
        bottom, top = panel.get_ylim()
        panel.set_ylim(bottom, top * (top / bottom) ** (1.3 * (1 - high)))


def _plain_ticks(axis: Any) -> None:
    """Of a logarithmic axis: 600, not 6x10^2; between decades too where there are few."""
    low, high = axis.get_view_interval()
    between = (2.0, 5.0) if high / low > 10 else (2.0, 3.0, 4.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(subs=(1.0, *(between if high / low < 300 else ())), numticks=24))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(NullLocator())


def _legend(figure: Any, panels: Any, columns: int = 3) -> None:
    """One below all panels, with every label once, and marks that any line may have last."""
    entries = [entry for panel in panels.flat for entry in zip(*panel.get_legend_handles_labels(), strict=True)]
    lines = {label: line for line, label in entries}
    for mark in (DOUBTFUL, NOT_RUN, ON_DEVICE):
        if lines.pop(mark["label"], None):
            lines[mark["label"]] = Line2D([], [], **{"color": "0.4"} | mark)
    style = {"ncols": columns, "frameon": False, "fontsize": 10}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", **style)


def _widths(row: Cost) -> str:
    return f"C={row.channels}, K={row.key_channels}, V={row.value_channels}, {row.dtype}"


def _where(rows: Sequence[Cost]) -> str:
    """Where seconds come from; more than one place is said too, and what a device's clocks were."""
    timed = [row for row in rows if row.seconds is not None]
    places = {f"{row.host} (threads: {row.threads})" if row.host else f"a {row.device} without a name" for row in timed}
    clocks = next((f", {row.clocks}" for row in reversed(timed) if row.clocks), "")
    return f"measured on {' and '.join(sorted(places))}{clocks}" if places else "not measured"


# -- costs over the size of the map ------------------------------------------------------------------------------------


def headline(rows: Sequence[Cost], path: Path) -> None:
    """Draw one panel, the first of the rows, for those whom everyone knows: seconds, or FLOPs where none were measured.

    Args:
        rows: what a CSV held.
        path: the PNG to write.
    """
    rows = [row for row in rows if row.panel == rows[0].panel]
    flops, _, time = QUANTITIES
    quantity = time if any(row.seconds is not None for row in rows if row.provider == OURS) else flops
    looks = {name: look for name, look in LOOKS.items() if name in HEADLINE}
    with _saved(path, 1, 1, 150, figsize=(8, 6.2)) as (figure, panels):
        panel = panels[0, 0]
        _draw_scaling(panel, rows, quantity, looks)
        panel.set(xlabel=MAPS[len(rows[0].size)], ylabel=f"{quantity.title} [{quantity.unit}]")
        _legend(figure, panels, columns=2)
        how = _where(rows) if quantity is time else "counted"
        level, pass_ = rows[0].panel
        figure.suptitle(message(rows, quantity), fontsize=13)
        panel.set_title(f"{LEVEL_TITLES[level]}, {PASS_TITLES[pass_]}; {_widths(rows[0])}\n{how}", fontsize=9)


def message(rows: Sequence[Cost], quantity: Quantity) -> str:
    """What a figure says, in a line: ours beside the fused dense, on the largest map of the first panel with both."""
    sound = [row for row in rows if quantity.of(row) and not (quantity.column == "seconds" and row.doubtful)]
    known = {(row.provider, row.size): row for row in sound if row.panel == rows[0].panel}
    both = [size for name, size in known if name == OURS and (FUSED, size) in known]
    if not both:
        return f"{quantity.title} of attention over a feature map"
    size = max(both, key=math.prod)
    ratio = (quantity.of(known[FUSED, size]) or 0) / (quantity.of(known[OURS, size]) or 1)
    times = f"PyTorch's fused dense attention takes {short(ratio)} times ISA's {quantity.title.lower()}"
    times = times.replace("flops", "FLOPs") + f" on {format_size(size)}"
    return times + (": ISA saves FLOPs and time, not memory" if quantity.column == "peak_bytes" and ratio < 2 else "")


def scaling(rows: Sequence[Cost], quantity: Quantity, path: Path) -> None:
    """Draw one quantity over the number of pixels, log-log, a panel for each level and pass, a line a provider.

    Args:
        rows: what a CSV held.
        quantity: what is drawn.
        path: the PNG to write.
    """
    levels = [level for level in LEVELS if any(row.level == level for row in rows)]
    passes = [pass_ for pass_ in PASSES if any(row.pass_ == pass_ for row in rows)]
    size = (2 + 6 * len(levels), 2.2 + 4.4 * len(passes))
    how = _where(rows) if quantity.column == "seconds" else "counted on fake tensors"
    with _saved(path, len(passes), len(levels), 130, figsize=size, sharex=True) as (figure, panels):
        for panel, (pass_, level) in zip(panels.flat, product(passes, levels), strict=True):
            _draw_scaling(panel, [row for row in rows if row.panel == (level, pass_)], quantity, LOOKS)
            panel.set_title(f"{LEVEL_TITLES[level]}, {PASS_TITLES[pass_]}", fontsize=11)
            panel.tick_params(labelbottom=True)
        for panel in panels[:, 0]:
            panel.set_ylabel(f"{quantity.title} [{quantity.unit}]")
        for panel in panels[-1]:
            panel.set_xlabel(MAPS[len(rows[0].size)])
        _legend(figure, panels, columns=len(levels) + 1)
        numbers = f"numbers: {FUSED} or dense, in times {OURS}"
        lines = [message(rows, quantity), f"{_widths(rows[0])}; {how}", numbers]
        if quantity.column == "flops" and any(row.provider == FUSED for row in rows):
            lines.append(_chunks(rows[0]))
        figure.suptitle("\n".join(textwrap.fill(line, 70 * len(levels)) for line in lines), fontsize=12)


def _chunks(row: Cost) -> str:
    """Why the fused dense attention has more FLOPs than the plain one."""
    K, V = row.key_channels, row.value_channels
    number = -(-V // K)
    more = f"attention alone, forward: {FUSED} spends {Fraction(2 * number * K, K + V)} of dense's FLOPs"
    return f"{more}: sdpa wants values as wide as keys, and each of {number} chunks of V computes the scores again"


def _draw_scaling(panel: Any, rows: Sequence[Cost], quantity: Quantity, looks: Mapping[str, Look]) -> None:
    panel.set(xscale="log", yscale="log")
    sizes = {row.pixels: row.size for row in sorted(rows, key=lambda row: row.pixels)}
    if rows and rows[0].level == "attention" and looks is LOOKS:
        _draw_closed_form(panel, rows[0], np.geomspace(min(sizes), max(sizes), 200), quantity)
    _draw_lines(panel, rows, quantity, lambda row: row.pixels, looks)
    bottom, top = panel.get_ylim()
    panel.set_ylim(bottom * (bottom / top) ** 0.06, top)  # room for numbers
    _draw_ratios(panel, rows, quantity)
    panel.set_xticks(list(sizes), list(map(format_size, sizes.values())), fontsize=8, rotation=90)
    panel.xaxis.set_minor_locator(NullLocator())
    _plain_ticks(panel.yaxis)
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
    """How many times ours the fused dense takes, and the dense with its scores where that is more than the fused.

    An arrow from ours up, or where the lines are close a number at the bottom, at sizes far enough apart to be read.
    """
    known = {(row.provider, row.pixels): value for row in rows if (value := quantity.of(row)) is not None}
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
    for name in (FUSED, "dense"):
        both = sorted(pixels for other, pixels in known if other == OURS and (name, pixels) in known)
        for pixels in _apart(both, 3.5):
            low, high, fused = known[OURS, pixels], known[name, pixels], known.get((FUSED, pixels), 0)
            style = {"ha": "center", "va": "center", "fontsize": 9, "color": LOOKS[name].colour, "zorder": 5}
            text = f"{short(high / low)}x"
            if high / low < 2 and name == FUSED:
                panel.text(pixels, 0.03, text, transform=panel.get_xaxis_transform(), **style)
            elif high / low >= 2 and (name == FUSED or high >= 2 * fused):
                arrow = {"arrowstyle": "<->", "color": "0.45", "linewidth": 0.8, "shrinkA": 4, "shrinkB": 4}
                panel.annotate("", (pixels, high), (pixels, low), arrowprops=arrow)
                panel.text(pixels, (low * high) ** 0.5, text, bbox=box, **style)


def _apart(values: Sequence[int], factor: float) -> list[int]:
    """Those of the ascending values that are at least `factor` times the one kept before."""
    kept: list[int] = []
    for value in values:
        if not kept or value >= factor * kept[-1]:
            kept.append(value)
    return kept


# -- costs over the partition size -------------------------------------------------------------------------------------


def partition_sizes(rows: Sequence[Cost], window: tuple[int, ...], path: Path) -> None:
    """Draw a pass: each quantity against the partition size at both levels, and bars of the blocks at one size."""
    with _saved(path, 3, 3, 110, figsize=(16, 13), height_ratios=(1, 1, 0.9)) as (figure, panels):
        for panel, (level, quantity) in zip(panels[:2].flat, product(BLOCK_LEVELS, QUANTITIES), strict=True):
            _draw_sizes(panel, [row for row in rows if row.level == level], quantity)
            panel.set_title(f"{quantity.title}, {LEVEL_TITLES[level]}", fontsize=12)
        at_window = [row for row in rows if row.level == "module" and row.window == window]
        for panel, quantity in zip(panels[2], QUANTITIES, strict=True):
            _draw_bars(panel, at_window, quantity)
            panel.set_title(f"{quantity.title} of blocks and modules, P = {format_size(window)}", fontsize=12)
        _legend(figure, panels[:1])
        how = f"{PASS_TITLES[rows[0].pass_]}; {_widths(rows[0])}; time {_where(rows)}"
        figure.suptitle(f"{cheapest(rows)}\n{how}", fontsize=14)


def cheapest(rows: Sequence[Cost]) -> str:
    """The partition size with the fewest FLOPs of both stages' attention, in a sentence without its full stop."""
    best = min((row for row in rows if row.provider == "long-short"), key=lambda row: row.flops)
    return f"On {format_size(best.size)} the attention of both stages has the fewest FLOPs at P = {best.partition_size}"


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
        panel.set_ylim(0, 1.1 * panel.get_ylim()[1])
    else:
        _plain_ticks(panel.yaxis)
    panel.set_xticks(list(areas), list(areas.values()), fontsize=9, rotation=30)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(color="0.92")


def _draw_bars(panel: Any, rows: Sequence[Cost], quantity: Quantity) -> None:
    """A bar a variant with its value beside it."""
    values = {row.provider: quantity.of(row) for row in rows}
    marks = {row.provider: " ?" if row.doubtful and quantity.column == "seconds" else "" for row in rows}
    lengths = [value or 0.0 for value in values.values()]
    colours = [STAGE_LOOKS[name].colour if name in STAGE_LOOKS else "#999999" for name in values]
    panel.barh(list(values), lengths, color=colours, height=0.7)
    for name, value in values.items():
        text = " not run" if value is None else f" {short(value)}{marks[name]}"
        panel.text(value or 0.0, name, text, va="center", fontsize=10)
    panel.invert_yaxis()
    panel.set(xlabel=quantity.unit, xlim=(0, 1.18 * max(lengths, default=1) or 1))


# -- costs over the number of devices ----------------------------------------------------------------------------------


def sharding_costs(rows: Sequence[sharding.Row], rate: float, links: Sequence[float], path: Path) -> None:
    """Draw what was run above, and below what was simulated: peak bytes, bytes sent and predicted seconds.

    Times of more processes than cores say nothing of devices: they are hollow and grey.
    """
    run, simulated = ([row for row in rows if row.source == source] for source in ("run", "simulated"))
    strong, weak = ([row for row in run if row.scaling == scaling] for scaling in ("strong", "weak"))
    sent = [row for row in simulated if row.devices > 1]
    drawn: tuple[tuple[list[sharding.Row], str, str, float, str], ...] = (
        (strong, "seconds", "ms", 1e-3, "time, the map stays (strong), run"),
        (weak, "seconds", "ms", 1e-3, "time, the map grows with N (weak), run"),
        (strong, "peak_bytes", "MiB", 2**20, "peak memory of a device, run (strong)"),
        (simulated, "peak_bytes", "GiB", 2**30, "peak memory of a device, simulated"),
        (sent, "sent_bytes", "GiB", 2**30, "what a device sends, simulated"),
    )
    with _saved(path, 2, 3, 110, figsize=(16, 10)) as (figure, panels):
        for panel, (these, column, unit, scale, title) in zip(panels.flat, drawn, strict=False):
            panel.set_title(title, fontsize=12)
            panel.set_ylabel(unit)
            for label, look in zip(dict.fromkeys(map(_of_line, these)), DEVICE_LOOKS, strict=False):
                _draw_devices(panel, [row for row in these if _of_line(row) == label], column, scale, label, look)
        if simulated:
            largest, pass_ = max((row.size for row in simulated), key=math.prod), simulated[0].pass_
            line = [row for row in simulated if row.size == largest and row.pass_ == pass_]
            for link, look in zip(links, DEVICE_LOOKS, strict=False):
                times = [row.predicted(rate, link) for row in line]
                style = {"color": look.colour, "marker": look.marker, "linestyle": look.line}
                panels[1, 2].plot([row.devices for row in line], times, label=f"{link:g} GB/s", **style)
            panels[1, 2].set_title(f"PREDICTED {pass_} of {format_size(largest)} at {rate:g} TFLOP/s", fontsize=12)
            panels[1, 2].set_ylabel("s")
        for panel in panels.flat:
            panel.set_xlabel("devices N")
            if panel.lines:
                panel.set_xscale("log", base=2)
                panel.set_yscale("log")
                panel.set_xticks(sorted({int(x) for line in panel.lines for x in line.get_xdata()}))
                panel.xaxis.set_major_formatter("{x:g}")
                panel.xaxis.set_minor_locator(NullLocator())
                _plain_ticks(panel.yaxis)
                panel.grid(color="0.92")
                panel.legend(frameon=False, fontsize=9)
        hosts = sorted({f"{row.host or 'a CPU without a name'}, {row.cores} cores" for row in run})
        where = f"run with gloo on {' and '.join(hosts)}; the rest counted on fake tensors"
        figure.suptitle(f"The memory of a device falls as 1/N when N devices share a map\n{where}", fontsize=14)


def _draw_devices(panel: Any, line: Sequence[sharding.Row], column: str, scale: float, label: str, look: Look) -> None:
    """A line over devices; beneath it the best that can be, and hollow what was run on too few cores."""
    devices, values = [row.devices for row in line], [getattr(row, column) / scale for row in line]
    best = {
        "peak_bytes": ([values[0] * devices[0] / N for N in devices], "1/N"),
        "sent_bytes": ([row.bound_bytes / scale for row in line], "every pixel leaves and returns once"),
    }
    fair = sum(column != "seconds" or not row.oversubscribed for row in line)
    style = {"color": look.colour, "marker": look.marker, "markersize": 6}
    panel.plot(devices[:fair], values[:fair], linestyle=look.line, label=label, **style)
    if fair < len(line):
        title = "more processes than cores" if look is DEVICE_LOOKS[0] else None
        hollow = {"color": "0.6", "marker": look.marker, "linestyle": ":", "markerfacecolor": "none"}
        panel.plot(devices[max(fair - 1, 0) :], values[max(fair - 1, 0) :], label=title, zorder=1, **hollow)
    if column in best:
        bound, name = best[column]
        panel.plot(devices, bound, color="0.8", linewidth=6, zorder=0, label=name if look is DEVICE_LOOKS[0] else None)


def _of_line(row: sharding.Row) -> str:
    """What rows of one line share: heights grow with N where a map is run."""
    return row.pass_ if row.source == "run" else f"{format_size(row.size)} {row.pass_}"


# -- errors ------------------------------------------------------------------------------------------------------------


def model_memory(rows: Sequence[memory.Row], path: Path) -> None:
    """Peak bytes over the side of the input, original and accelerated: a panel for each network of several sizes."""
    networks = [name for name in dict.fromkeys(row.network for row in rows) if len(_of_network(rows, name)) > 1]
    with _saved(path, 1, max(1, len(networks)), 150, figsize=(4 * max(1, len(networks)), 3.8)) as (figure, panels):
        for panel, name in zip(panels.flat, networks, strict=False):
            for pass_, who in product(("forward", "training"), ("original", "accelerated")):
                mine = [row for row in rows if (row.network, row.pass_, row.who) == (name, pass_, who)]
                points = [(int(row.size.split("x")[-1]), row.peak_bytes / 2**30) for row in mine]
                colour = "#0072B2" if who == "accelerated" else "#D55E00"
                style = {"linestyle": "-" if pass_ == "training" else "--", "marker": "o", "color": colour}
                panel.plot(*zip(*points, strict=True), label=f"{who}, {PASS_TITLES[pass_]}", **style)
            panel.set(title=f"{name}, inputs {mine[0].size.count('x') + 1}-D", xlabel="side of the input", xscale="log")
            panel.set(yscale="log", ylabel="peak GiB, fp32, counted")
            _plain_ticks(panel.xaxis)
            _plain_ticks(panel.yaxis)
        _legend(figure, panels, columns=4)


def _of_network(rows: Sequence[memory.Row], name: str) -> set[str]:
    return {row.size for row in rows if row.network == name}


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
                mark = {"marker": MARKERS[i % len(MARKERS)], "color": f"C{i}", "markersize": 5, "linestyle": ""}
                panel.plot(x, median(known), label=label, **mark)
        panel.axhline(1.0, color="black", linewidth=1)
        panel.set(yscale="log", ylabel="error / what the budget allows, median to worst")
        panel.set_title(f"{len(rows)} random cases against fp64")
        panel.set_xticks(range(len(names)), names)
        panel.legend(fontsize="small", ncols=2)
