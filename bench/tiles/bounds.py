"""Every width and window of the field beside what no implementation can go below: DRAM, matrix units, exponentials.

A cell is a problem and a pass of the grid (bench/tiles/grid.py), with the tiles that the run time would take. Its bound
is the largest of three times: its inputs and outputs once through DRAM, its products on the matrix units, and one
exponential a pair of tokens. All times are PREDICTED. Rows go to tile_bounds.csv, beside those that it has of other
targets and dtypes; tile_bounds.png is drawn from that file and from nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from csv import DictReader as csv_rows
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from bench.arguments import add_out
from bench.records import write_text
from bench.terminal import Table, Terminal
from bench.tiles import grid, options
from bench.tiles.binaries import Binaries
from bench.tiles.compile import DTYPES, PASSES, Problem, pass_launches
from bench.tiles.report import Kernel, Pass
from bench.tiles.roofline import Machine, predict

GOALS = {"forward": (1.3, 2.0), "backward": (2.0, 3.0)}  # of predicted / bound: the median of all cells, the worst
HEADER = ("target", "dtype", "pass", "K", "V", "heads", "bias", "tokens", "maps", "us", "DRAM", "matrix", "exp", "roof",
          "ratio", "holds", "bound by", "violations")  # fmt: skip
WORDS = ("target", "dtype", "pass", "bias", "roof", "holds", "bound by", "violations")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, targets = parser.add_argument, grid.TARGETS
    add("--targets", nargs="+", choices=targets, default=["sm_90"], metavar="TARGET",
        help=f"of {' '.join(targets)} (default: sm_90)")  # fmt: skip
    add("--dtypes", nargs="+", type=options.read_dtype, default=["bfloat16"], metavar="DTYPE", help="default: bf16")
    add("--redraw", action="store_true", help="draw what is in the CSV, and compile nothing")
    add_out(parser, "tile_bounds.csv and tile_bounds.png")
    options.add_compilers(parser)


def run(args: argparse.Namespace) -> None:
    said, csv, png = Terminal(args), args.out / "tile_bounds.csv", args.out / "tile_bounds.png"
    if args.redraw:
        draw(read(csv)).savefig(png, dpi=80)
        said.end(f"drew {png}")
        return
    cells = list[Cell]()
    with options.compilers(args, said) as binaries:
        for target, dtype in product(args.targets, args.dtypes):
            cells += measure(options.first_machine(target), grid.cells(dtype), binaries)
    table = Table("", HEADER, [cell.row for cell in cells], words=WORDS)
    said.show(table)
    write(csv, table)
    draw(read(csv)).savefig(png, dpi=80)
    said.say(*summary(cells))
    said.end(f"{sum(cell.holds for cell in cells)} of {len(cells)} cells are within the worst of their goals", csv, png)


@dataclass(frozen=True)
class Cell:
    """A pass of the grid; a kernel that cannot run is in `broken` and not among those of the pass."""

    whole: Pass
    violations: str
    broken: bool

    @property
    def ratio(self) -> float | None:
        return None if self.broken else self.whole.ratio

    @property
    def holds(self) -> bool:
        return self.ratio is not None and self.ratio <= GOALS[self.whole.name][1] and not self.violations

    @property
    def row(self) -> list[object]:
        whole, problem, roofs = self.whole, self.whole.problem, self.whole.roofs
        by = ", ".join(f"{kernel.launch.label} {kernel.prediction.bound}" for kernel in whole.kernels)
        return [
            whole.gpu.target, problem.dtype, whole.name, problem.key_width, problem.value_width, problem.heads,
            "bias" if problem.bias else "none", problem.partition.tokens, problem.maps,
            None if self.broken else f"{1e6 * whole.seconds:.1f}", *(f"{1e6 * roof:.1f}" for roof in roofs.values()),
            max(roofs, key=roofs.__getitem__), None if self.ratio is None else f"{self.ratio:.2f}",
            "yes" if self.holds else "no", by, self.violations or None,
        ]  # fmt: skip


def measure(gpu: Machine, cells: Iterable[tuple[Problem, str]], binaries: Binaries) -> list[Cell]:
    """What the run time would launch for each cell, all compiled together."""
    wanted = [(problem, pass_, pass_launches(gpu.target, problem, pass_)) for problem, pass_ in cells]
    verdicts = iter(binaries.verdicts(launch for _, _, launches in wanted for launch in launches))
    found = []
    for problem, pass_, launches in wanted:
        mine = [next(verdicts) for _ in launches]
        runs = [v for v in mine if v.binary is not None and v.binary.ctas_per_sm]
        kernels = [
            Kernel(v.launch, v.binary, v.violations, predict(v.launch, v.binary, gpu), gpu) for v in runs if v.binary
        ]
        violations = "; ".join(f"{v.launch.label} {text}" for v in mine for text in v.violations)
        found.append(Cell(Pass(problem, pass_, gpu, kernels), violations, broken=len(runs) < len(mine)))
    return found


def summary(cells: Iterable[Cell]) -> Iterator[str]:
    """Medians and worst ratios of each target, dtype and pass."""
    groups = dict[tuple[str, str, str], list[float]]()
    for cell in cells:
        key = cell.whole.gpu.target, cell.whole.problem.dtype, cell.whole.name
        groups.setdefault(key, []).append(float("inf") if cell.ratio is None else cell.ratio)
    for (target, dtype, pass_), ratios in groups.items():
        (middle, worst), count = GOALS[pass_], sum(ratio <= GOALS[pass_][1] for ratio in ratios)
        yield (
            f"{target}, {dtype}, {pass_}: PREDICTED / bound median {median(ratios):.2f} (goal {middle}), worst "
            f"{max(ratios):.2f} (goal {worst}), {count} of {len(ratios)} within {worst}"
        )


# -- the files ---------------------------------------------------------------------------------------------------------


def write(path: Path, table: Table) -> None:
    """Rows into a CSV, instead of what it has of the same targets and dtypes."""
    header, *lines = table.csv().splitlines()
    mine = {_whose(line) for line in lines}
    before = path.read_text().splitlines() if path.exists() else [header]
    others = [line for line in before[1:] if before[0] == header and _whose(line) not in mine]
    order = {f"{target},{dtype}": i for i, (dtype, target) in enumerate(product(DTYPES, grid.TARGETS))}
    rows = sorted(others + lines, key=lambda line: order[_whose(line)])  # stable
    write_text(path, "\n".join([header, *rows]) + "\n")


def _whose(line: str) -> str:
    """Target and dtype of a row."""
    return ",".join(line.split(",")[:2])


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV.

    Raises:
        argparse.ArgumentError: there is none, or it has other columns.
    """
    if not path.exists():
        raise argparse.ArgumentError(None, f"--redraw: there is no {path}")
    with path.open(newline="") as file:
        rows = list(csv_rows(file))
    if not rows or tuple(rows[0]) != HEADER:
        raise argparse.ArgumentError(None, f"--redraw: {path} has not the columns {', '.join(HEADER)}")
    return rows


# -- the picture -------------------------------------------------------------------------------------------------------

PANELS = tuple(product(PASSES, ("none", "bias")))  # across
BEYOND = 8.0  # times the bound, from which on the colour is the same


def draw(rows: Sequence[dict[str, str]]) -> Figure:
    """A row of panels a target and dtype: widths down, tokens across, predicted / bound as colour and as a number."""
    wholes = list(dict.fromkeys((row["target"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(22, 0.8 + 3.3 * len(wholes)), layout="constrained")
    panels = figure.subplots(len(wholes), len(PANELS), squeeze=False)
    widths, tokens = [f"{k}" if k == v else f"{k}/{v}" for k, v in grid.WIDTHS], [str(n) for n in grid.TOKENS]
    colours = LogNorm(1, BEYOND)
    for (whole, (pass_, bias)), panel in zip(product(wholes, PANELS), panels.flat, strict=True):
        values = np.full((len(widths), len(tokens)), np.nan)
        for row in rows:
            if (row["target"], row["dtype"], row["pass"], row["bias"]) == (*whole, pass_, bias) and row["ratio"]:
                width = row["K"] if row["K"] == row["V"] else f"{row['K']}/{row['V']}"
                values[widths.index(width), tokens.index(row["tokens"])] = float(row["ratio"])
        image = panel.imshow(np.clip(values, 1, BEYOND), norm=colours, cmap="RdYlGn_r", aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            text, color = "-" if np.isnan(value) else f"{value:.1f}", "white" if value > BEYOND / 1.3 else "black"
            panel.text(j, i, text, ha="center", va="center", fontsize=7, color=color)
        middle = np.nanmedian(values) if np.isfinite(values).any() else np.nan
        panel.set_title(
            f"{' '.join(whole)}, {pass_}, {'with a bias' if bias == 'bias' else 'no bias'}: median {middle:.2f}"
        )
        panel.set_xticks(range(len(tokens)), tokens, rotation=60)
        panel.set_yticks(range(len(widths)), widths)
    for panel in panels[:, 0]:
        panel.set_ylabel("width, K or K/V")
    for panel in panels[-1]:
        panel.set_xlabel("tokens of a group")
    bar = figure.colorbar(image, ax=panels, shrink=0.6, pad=0.01, label="PREDICTED / the largest of DRAM, matrix, exp")
    bar.set_ticks([1, 1.3, 2, 3, 5, 8], labels=["1", "1.3", "2", "3", "5", "8 and more"])
    bar.minorticks_off()
    return figure
