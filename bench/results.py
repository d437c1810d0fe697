"""What comes out: rows to a CSV, tables for the terminal, and plots that read nothing but the CSV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from rich import box
from rich.table import Table

from bench.providers import PROVIDERS
from bench.records import format_size, short
from bench.workload import LEVELS, PASSES, Level, Pass, Workload, closed_form_flops, closed_form_score_bytes

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend without a display

OURS = "isa"  # what the others are compared with


@dataclass(frozen=True)
class Row:
    """One line of a CSV: what one provider costs on one workload. A column is a field's name less a last "_"."""

    provider: str
    level: Level
    pass_: Pass
    height: int
    width: int
    channels: int
    key_channels: int
    value_channels: int
    dtype: str  # torch's name, without "torch."
    device: str
    flops: int  # 2 to a multiply-add
    peak_bytes: int
    seconds: float | None  # None where it was not run
    source: str  # "counted", or "counted+measured" where seconds are there
    partition_size: str  # "8x8", height first

    @classmethod
    def of(
        cls,
        provider: str,
        workload: Workload,
        device: str,
        counted: tuple[int, int] = (0, 0),
        seconds: float | None = None,
    ) -> Row:
        """The row of a provider on a workload, from what `measure.count` and `measure.seconds` found."""
        return cls(
            provider=provider,
            level=workload.level,
            pass_=workload.pass_,
            height=workload.height,
            width=workload.width,
            channels=workload.channels,
            key_channels=workload.key_channels,
            value_channels=workload.value_channels,
            dtype=str(workload.dtype).removeprefix("torch."),
            device=device,
            flops=counted[0],
            peak_bytes=counted[1],
            seconds=seconds,
            source="counted" if seconds is None else "counted+measured",
            partition_size=format_size(workload.partition_size),
        )

    @property
    def cell(self) -> Row:
        """What was measured without what was found: rows of one cell are the same measurement, made twice."""
        return replace(self, flops=0, peak_bytes=0, seconds=None, source="")

    @property
    def window(self) -> tuple[int, int]:
        """The partition size (P_h, P_w)."""
        height, width = map(int, self.partition_size.split("x"))
        return height, width

    @property
    def map(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def pixels(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class Quantity:
    """A column that is compared: how a table and a plot show it."""

    column: str
    title: str
    unit: str
    scale: float  # of the unit
    file: str

    def of(self, row: Row) -> float | None:
        value = getattr(row, self.column)
        return None if value is None else value / self.scale


QUANTITIES = (
    Quantity("flops", "FLOPs", "GFLOPs", 1e9, "flops.png"),
    Quantity("peak_bytes", "Peak memory", "MiB", 2**20, "memory.png"),
    Quantity("seconds", "Time", "ms", 1e-3, "time.png"),
)


def summary(rows: Sequence[Row]) -> list[Table]:
    """A table for each level and pass: for each quantity ours per map, and everyone as so many times ours."""
    panels = {_panel(row): [other for other in rows if _panel(other) == _panel(row)] for row in rows}
    return [_summary(members, *panel) for panel, members in panels.items()]


def _summary(rows: Sequence[Row], level: Level, pass_: Pass) -> Table:
    names = list(dict.fromkeys(row.provider for row in rows))
    relative = f"   ({OURS} in units, the others in times {OURS})" if OURS in names else ""
    table = Table(title=f"{level} level, {pass_}{relative}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    table.add_column("")
    cells = {(row.provider, row.map): row for row in rows}
    sizes = list(dict.fromkeys(row.map for row in rows))
    for size in sizes:
        table.add_column(format_size(size), justify="right", no_wrap=True)
    for quantity in QUANTITIES:
        for name in names:
            values = [_cell(quantity, cells.get((name, size)), cells.get((OURS, size))) for size in sizes]
            unit = quantity.unit if name == names[0] else ""
            table.add_row(unit, name, *values, end_section=name == names[-1])
    return table


def _cell(quantity: Quantity, row: Row | None, ours: Row | None) -> str:
    value = quantity.of(row) if row else None
    unit = quantity.of(ours) if ours else None
    if value is None:
        return "-"
    if unit and row is not ours:
        return f"{short(value / unit)}x"
    return short(value) if value < 100 else f"{value:,.0f}"


def plot(rows: Sequence[Row], quantity: Quantity, path: Path) -> None:
    """Draw one quantity over the number of pixels, log-log, a panel for each level and pass, a line a provider.

    Args:
        rows: what a CSV held.
        quantity: what is drawn.
        path: the PNG to write.
    """
    levels = [level for level in LEVELS if any(row.level == level for row in rows)]
    passes = [pass_ for pass_ in PASSES if any(row.pass_ == pass_ for row in rows)]
    figure, axes = plt.subplots(
        len(passes),
        len(levels),
        figsize=(1 + 6 * len(levels), 1.8 + 4.2 * len(passes)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for (i, pass_), (j, level) in product(enumerate(passes), enumerate(levels)):
        panel = axes[i, j]
        _draw(panel, [row for row in rows if _panel(row) == (level, pass_)], quantity)
        panel.set_title(_TITLES[level, pass_], fontsize=11)
        panel.tick_params(labelbottom=True, labelleft=True)
        if j == 0:
            panel.set_ylabel(f"{quantity.title} [{quantity.unit}]")
        if i == len(passes) - 1:
            panel.set_xlabel("map, height x width (axis: number of pixels)")
    entries = [entry for panel in axes.flat for entry in zip(*panel.get_legend_handles_labels(), strict=True)]
    legend = {label: line for line, label in entries}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.suptitle(_headline(rows, quantity), fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


_TITLES: dict[tuple[Level, Pass], str] = {
    ("attention", "forward"): "attention alone (q, k, v → context), forward",
    ("attention", "training"): "attention alone, forward + backward",
    ("module", "forward"): "whole block with its projections, forward",
    ("module", "training"): "whole block, forward + backward",
    ("head", "forward"): "whole segmentation head, forward",
    ("head", "training"): "whole segmentation head, forward + backward",
}


def _draw(panel: Any, rows: Sequence[Row], quantity: Quantity) -> None:
    panel.set(xscale="log", yscale="log")
    pixels = sorted({row.pixels for row in rows})
    if rows and rows[0].level == "attention":
        _draw_closed_form(panel, rows[0], np.geomspace(pixels[0], pixels[-1], 200), quantity)
    lines: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row.pixels):
        if (value := quantity.of(row)) is not None:
            lines.setdefault(row.provider, {})[row.pixels] = value
    for name, line in lines.items():
        provider = PROVIDERS[name]
        filled = provider.line == "-"
        panel.plot(
            *zip(*line.items(), strict=True),
            color=provider.colour,
            marker=provider.marker,
            linestyle=provider.line,
            markersize=6 if filled else 10,  # equal costs lie on one another: the hollow marker stays visible
            markerfacecolor=provider.colour if filled else "none",
            label=provider.title,
        )
    _draw_ratios(panel, lines.get("dense", {}), lines.get(OURS, {}))
    sizes = {row.pixels: row.map for row in rows}
    ticks = _apart(pixels, 1.6)
    panel.set_xticks(ticks, [format_size(sizes[tick]) for tick in ticks], fontsize=8)
    panel.minorticks_off()
    panel.grid(color="0.92")
    panel.set_axisbelow(True)


def _draw_closed_form(panel: Any, row: Row, pixels: Any, quantity: Quantity) -> None:
    """The paper's formulas as broad bands beneath the points. There is none for time."""
    for name, size, formula in (("dense", None, "HW"), (OURS, row.window, "HW/P_hP_w + P_hP_w")):
        if quantity.column == "flops":
            values = closed_form_flops(pixels, row.key_channels, row.value_channels, row.pass_, size)
            label = f"closed form, $2\\,(K+V)\\,HW\\,n,\\ \\ n = {formula}$"
        elif quantity.column == "peak_bytes":
            values = closed_form_score_bytes(pixels, getattr(torch, row.dtype).itemsize, size)
            label = f"one copy of the scores, $HW\\,n,\\ \\ n = {formula}$"
        else:
            return
        colour = PROVIDERS[name].colour
        panel.plot(pixels, values / quantity.scale, color=colour, linewidth=8, alpha=0.2, label=label, zorder=1)


def _draw_ratios(panel: Any, dense: dict[int, float], ours: dict[int, float]) -> None:
    """An arrow from ours up to dense with their ratio, at sizes far enough apart to be read."""
    for pixels in _apart(sorted(dense.keys() & ours.keys()), 3.5):
        low, high = ours[pixels], dense[pixels]
        if high / low >= 2:  # closer lines leave no room
            style = {"arrowstyle": "<->", "color": "0.45", "linewidth": 0.8, "shrinkA": 4, "shrinkB": 4}
            panel.annotate("", (pixels, high), (pixels, low), arrowprops=style)
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.9}
            middle = (low * high) ** 0.5
            panel.text(pixels, middle, f"{short(high / low)}x", ha="center", va="center", fontsize=10, bbox=box)


def _headline(rows: Sequence[Row], quantity: Quantity) -> str:
    row = rows[0]
    widths = f"C={row.channels}, K={row.key_channels}, V={row.value_channels}, {row.dtype}"
    how = f"measured on {row.device}" if quantity.column == "seconds" else "counted on fake tensors"
    return f"{quantity.title} of attention over a feature map ({widths}; {how})"


def _apart(values: Sequence[int], factor: float) -> list[int]:
    """Those of the ascending values that are at least `factor` times the one kept before."""
    kept: list[int] = []
    for value in values:
        if not kept or value >= factor * kept[-1]:
            kept.append(value)
    return kept


def _panel(row: Row) -> tuple[Level, Pass]:
    return row.level, row.pass_
