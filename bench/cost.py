"""What a provider costs on a workload: a row of results, the quantities that are compared, and tables of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from bench.records import format_size, short, table
from bench.workload import Level, Pass, Workload

OURS = "isa"  # what the others are compared with


@dataclass(frozen=True)
class Cost:
    """One line of a CSV."""

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
    def of(cls, provider: str, workload: Workload, device: str) -> Cost:
        """What is measured, before anything is found."""
        found: dict[str, Any] = {"flops": 0, "peak_bytes": 0, "seconds": None, "source": ""}
        return cls(provider=provider, level=workload.level, device=device, **workload.columns(), **found)

    def found(self, counted: tuple[int, int], seconds: float | None) -> Cost:
        """The row with what `measure.count` and `measure.seconds` found."""
        source = "counted" if seconds is None else "counted+measured"
        return replace(self, flops=counted[0], peak_bytes=counted[1], seconds=seconds, source=source)

    @property
    def cell(self) -> Cost:
        """What was measured without what was found: rows of one cell are the same measurement, made twice."""
        return replace(self, flops=0, peak_bytes=0, seconds=None, source="")

    @property
    def panel(self) -> tuple[Level, Pass]:
        """Of a plot or a table: what is measured alike."""
        return self.level, self.pass_

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

    def of(self, row: Cost) -> float | None:
        value = getattr(row, self.column)
        return None if value is None else value / self.scale


QUANTITIES = (
    Quantity("flops", "FLOPs", "GFLOPs", 1e9, "flops.png"),
    Quantity("peak_bytes", "Peak memory", "MiB", 2**20, "memory.png"),
    Quantity("seconds", "Time", "ms", 1e-3, "time.png"),
)


def summary(rows: Sequence[Cost]) -> list[Table]:
    """A table for each level and pass: for each quantity ours per map, and everyone as so many times ours."""
    panels = {row.panel: [other for other in rows if other.panel == row.panel] for row in rows}
    return [_summary(members, *panel) for panel, members in panels.items()]


def _summary(rows: Sequence[Cost], level: Level, pass_: Pass) -> Table:
    cells = {(row.provider, row.map): row for row in rows}
    names, sizes = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    relative = f"   ({OURS} in units, the others in times {OURS})" if OURS in names else ""
    lines: list[list[str]] = []
    for quantity in QUANTITIES:
        for name in names:
            values = [_cell(quantity, cells.get((name, size)), cells.get((OURS, size))) for size in sizes]
            lines.append([quantity.unit if name == names[0] else "", name, *values])
        lines.append([])
    header = ["", " ", *map(format_size, sizes)]
    return table(f"{level} level, {pass_}{relative}", header, lines, words=2)


def _cell(quantity: Quantity, row: Cost | None, ours: Cost | None) -> str:
    """A value in units, or in times ours; a dash where it is not known."""
    value, unit = (None if each is None else quantity.of(each) for each in (row, ours))
    if value is None:
        return "-"
    if unit and row is not ours:
        return f"{short(value / unit)}x"
    return short(value) if value < 100 else f"{value:,.0f}"
