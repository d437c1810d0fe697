"""``python -m bench pictures``: what the partitions are and what attention over them sees."""

from __future__ import annotations

import argparse
import string
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.cbook import get_sample_data
from matplotlib.cm import ScalarMappable
from matplotlib.colors import FuncNorm, ListedColormap, to_rgba
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from bench.arguments import add_out
from bench.terminal import Terminal
from isa_triton import Partition
from reference import affinity, long_range_groups, short_range_groups

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend without a display

CHOSEN = "#0072B2"
FAINT = 0.01  # weights, in parts of the largest, that are not shown
# Okabe and Ito's other colours: distinct without colour vision; the letters in the cells say the same in grey
OTHERS = ("#E69F00", "#009E73", "#CC79A7", "#999999", "#D55E00", "#F0E442", "#56B4E9", "#7F5FA0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out(parser, "the PNGs")


def run(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    said, paths = Terminal(args), [args.out / f"{name}.png" for name in PICTURES]
    said.say(f"Every picture goes to {args.out}")
    with said.progress("pictures", len(PICTURES)) as bar:
        for path, draw in zip(paths, PICTURES.values(), strict=True):
            bar.now(path.name)
            figure = draw()
            figure.savefig(path, dpi=130)
            plt.close(figure)
            bar.advance()
    said.end(f"{len(paths)} pictures of whom a pixel attends.", *paths)


def draw_partitions() -> Any:
    """Six partitions of one map that P does not divide, and whom one pixel attends under each."""
    size, p, query = (5, 8), (2, 3), (2, 4)
    interlaced, local = Partition.interlaced(size, stride=p), Partition.local(size, window=p)
    big = (
        (interlaced, "Interlaced, stride P = (2, 3): long range", "pixels 2 rows and 3 columns apart"),
        (local, "Local, window P = (2, 3): short range", "neighbours, 2 rows by 3 columns"),
    )
    small = (
        (Partition.interlaced(size, grid=(3, 2)), "Interlaced, grid = (3, 2)", "spread out"),
        (Partition.rows(size), "Rows", "a row each"),
        (Partition.columns(size), "Columns", "a column each"),
        (Partition.dense(size), "Dense", "the whole map"),
    )
    figure = plt.figure(figsize=(13, 9.4), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(5.6, 3.5))
    above.suptitle(
        "Pixels with the same letter attend each other: the letter is the group, the number the token's place in it",
        fontsize=16,
    )
    panels = above.subplots(1, 2)
    for axes, (partition, title, subtitle) in zip(panels, big, strict=True):
        _draw_partition(axes, partition, query, 16)
        axes.set(xlim=(-0.9, 9.1), ylim=(6.1, -0.8))
        axes.set_title(title, fontsize=15, weight="bold")
        axes.text(4, 6.25, f"{subtitle}: {_count(partition)}", fontsize=13, ha="center", va="top")
    _draw_extent(panels[0], (4.5, 7.5), (2.5, 4.5), p)
    _draw_extent(panels[1], (3, 6), (2, 4), p)
    for axes, (partition, title, subtitle) in zip(below.subplots(1, 4), small, strict=True):
        _draw_partition(axes, partition, query, 8)
        axes.set(xlim=(-0.1, 8.1), ylim=(6.1, -0.1))
        axes.set_title(f"{title}\n", fontsize=12, weight="bold")
        axes.text(4, -0.2, f"{subtitle}: {_count(partition)}", fontsize=10, ha="center")
    legend = (
        Patch(facecolor=CHOSEN, edgecolor="black", linewidth=3, label="one pixel, row 2, column 4"),
        Patch(facecolor=CHOSEN, label="its group: whom it attends"),
        Patch(facecolor=to_rgba(OTHERS[0], 0.25), label="other groups"),
        Patch(facecolor="white", edgecolor="0.6", linestyle=":", label="tokens outside the map"),
    )
    below.legend(handles=legend, loc="outside lower center", ncols=4, fontsize=12, frameon=False)
    return figure


def _draw_partition(axes: Any, partition: Partition, query: tuple[int, int], fontsize: float) -> None:
    """Every token of every group as a cell; the group of the pixel `query` (row, column) stands out."""
    chosen = partition.seat(*query)[0]
    for group, token in np.ndindex(partition.groups, partition.tokens):
        y, x, inside = partition.coordinates(group, token)
        colour = CHOSEN if group == chosen else to_rgba(OTHERS[(group - (group > chosen)) % len(OTHERS)], 0.25)
        ink = "white" if group == chosen else "0.3"
        style: dict[str, Any] = {"facecolor": colour, "edgecolor": "white"}
        if not inside:
            ink, style = "0.6", {"facecolor": "white", "edgecolor": "0.7", "linestyle": ":"}
        axes.add_patch(Rectangle((x, y), 1, 1, linewidth=1.5, **style))
        label = f"${string.ascii_uppercase[group]}_{{{token}}}$"
        axes.text(x + 0.5, y + 0.5, label, color=ink, fontsize=fontsize, ha="center", va="center")
    axes.add_patch(Rectangle((0, 0), *partition.size[::-1], fill=False, linewidth=2))
    axes.add_patch(Rectangle(query[::-1], 1, 1, fill=False, linewidth=4))
    axes.set_aspect("equal")
    axes.axis("off")


def _draw_extent(axes: Any, columns: tuple[float, float], rows: tuple[float, float], p: tuple[int, int]) -> None:
    """P as two dimension arrows beside the map."""
    arrow = {"arrowstyle": "<->", "linewidth": 1.5, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (columns[0], -0.2), (columns[1], -0.2), arrowprops=arrow)
    axes.annotate("", (-0.2, rows[0]), (-0.2, rows[1]), arrowprops=arrow)
    axes.text(sum(columns) / 2, -0.3, f"$P_w$ = {p[1]}", fontsize=13, ha="center", va="bottom")
    axes.text(-0.3, sum(rows) / 2, f"$P_h$ = {p[0]}", fontsize=13, ha="right", va="center", rotation=90)


def _count(partition: Partition) -> str:
    return f"{partition.groups} group{'s' * (partition.groups > 1)} of {partition.tokens} tokens"


def draw_constructors() -> Any:
    """Each constructor's parameter on one map: pixels of a colour attend each other, one group is outlined."""
    calls = (
        "interlaced((6, 8), stride=(2, 4))",
        "interlaced((6, 8), grid=(2, 4))",
        "rows((6, 8))",
        "local((6, 8), window=(3, 4))",
        "local((6, 8), window=(3, 4), shift=(1, 2))",
        "columns((6, 8))",
    )
    figure, panels = plt.subplots(2, 3, figsize=(12, 7.2), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)
    figure.suptitle("Pixels of one colour attend each other; the group of one pixel is blue and outlined", fontsize=13)
    for axes, call in zip(panels.flat, calls, strict=True):
        partition = eval(f"Partition.{call}", {"Partition": Partition})  # what the title says, and nothing else
        _draw_groups(axes, partition, (2, 4))
        axes.set_title(f"Partition.{call}", fontsize=9.5, family="monospace")
        axes.text(4, 6.2, _count(partition), fontsize=11, ha="center", va="top")
    return figure


def _draw_groups(axes: Any, partition: Partition, query: tuple[int, int]) -> None:
    """The map coloured by group; the group of the pixel `query` (row, column) is outlined."""
    height, width = partition.size
    groups = partition.seat(*np.indices(partition.size))[0]  # [H, W]
    chosen = groups == groups[query]
    others = np.array([to_rgba(colour, 0.45) for colour in OTHERS])
    colours = np.where(chosen[..., None], to_rgba(CHOSEN), others[groups - (groups > groups[query])])  # [H, W, 4]
    axes.imshow(colours, extent=(0, width, height, 0))
    axes.hlines(range(height + 1), 0, width, color="white", linewidth=1)
    axes.vlines(range(width + 1), 0, height, color="white", linewidth=1)
    around = np.pad(chosen, 1)
    for y, x in np.argwhere(around[1:, 1:-1] != around[:-1, 1:-1]):
        axes.hlines(y, x, x + 1, color="black", linewidth=3, capstyle="projecting")
    for y, x in np.argwhere(around[1:-1, 1:] != around[1:-1, :-1]):
        axes.vlines(x, y, y + 1, color="black", linewidth=3, capstyle="projecting")
    axes.set(xlim=(-0.1, width + 0.1), ylim=(height + 0.1, -0.1))
    axes.axis("off")


def draw_supports() -> Any:
    """Where A_long, A_short and their product are not zero, pixel by pixel and with the groups brought together."""
    size, p = (4, 6), (2, 3)
    pixels = size[0] * size[1]
    q = torch.zeros(1, *size, 1, 1)
    stages = (
        ("$A_{\\mathrm{long}}$", affinity(q, q, long_range_groups, p), Partition.interlaced(size, stride=p)),
        ("$A_{\\mathrm{short}}$", affinity(q, q, short_range_groups, p), Partition.local(size, window=p)),
    )
    figure, axes = plt.subplots(2, 3, figsize=(12.5, 9), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12, w_pad=0.08)
    figure.suptitle(
        f"Who attends whom on a map of {size[0]} by {size[1]} pixels, P = {p}: rows are queries, columns are keys,"
        " blue is attended",
        fontsize=13,
    )
    for column, (name, matrix, partition) in enumerate(stages):
        support = (matrix[0, 0] > 0).int()
        group, token = partition.seat(*np.divmod(np.arange(pixels), size[1]))
        by_group = np.lexsort((token, group))
        _draw_support(axes[0, column], support, f"{name}: {partition.tokens} keys a query", "pixels, row by row")
        _draw_support(axes[1, column], support[by_group][:, by_group], f"{name}: the same", "pixels, group by group")
    paths = (stages[1][1][0, 0] > 0).int() @ (stages[0][1][0, 0] > 0).int()
    _draw_support(
        axes[0, 2],
        paths,
        "$A_{\\mathrm{short}}\\,A_{\\mathrm{long}}$: every key, by one path each",
        "pixels, row by row",
    )
    axes[1, 2].axis("off")
    long_range, short_range = (partition.tokens for *_, partition in stages)
    axes[1, 2].text(
        0.02,
        0.5,
        "Sorted by group, both stages are\nblocks: that is all that is computed.\n\n"
        f"Two stages: {long_range} + {short_range} = {long_range + short_range} keys a query.\n"
        f"Dense attention: {pixels}.\n\n"
        "Yet every pixel sees every pixel:\nthe long range brings each value into\n"
        "the window, the short range from\nthere to the pixel.",
        fontsize=14,
        va="center",
        transform=axes[1, 2].transAxes,
    )
    return figure


def _draw_support(axes: Any, support: Tensor, title: str, order: str) -> None:
    axes.imshow(support.numpy(), cmap=ListedColormap(["white", CHOSEN]), vmin=0, vmax=1)
    pixels = len(support)
    axes.set_xticks(np.arange(-0.5, pixels), [""] * (pixels + 1))
    axes.set_yticks(np.arange(-0.5, pixels), [""] * (pixels + 1))
    axes.tick_params(length=0)
    axes.grid(color="0.85", linewidth=0.6)
    axes.set_title(title, fontsize=14)
    axes.set_xlabel(f"keys: {order}", fontsize=11)
    axes.set_ylabel(f"queries: {order}", fontsize=11)


def draw_photo() -> Any:
    """The affinity of one pixel of a photograph with every other, under dense attention and under ISA's stages."""
    p, shrink, (y, x) = (8, 8), 8, (36, 26)
    photo = plt.imread(str(get_sample_data("grace_hopper.jpg", asfileobj=False))) / 255
    height, width = photo.shape[0] // shrink, photo.shape[1] // shrink
    photo = photo[: height * shrink, : width * shrink].reshape(height, shrink, width, shrink, 3).mean((1, 3))
    q, k = _features(torch.from_numpy(photo).float())
    long_range, short_range = (
        affinity(q, k, groups, p, 1.0)[0, 0] for groups in (long_range_groups, short_range_groups)
    )
    pixel = y * width + x
    heat = ListedColormap(matplotlib.colormaps["inferno"](np.linspace(0.3, 1, 256)))
    strengths = FuncNorm((np.sqrt, np.square), FAINT, 1)
    panels = (
        ("dense", torch.softmax(k.flatten(0, 3) @ q[0, y, x, 0], 0)),
        ("long range", long_range[pixel]),
        ("short range", short_range[pixel]),
        ("long, then short range", short_range[pixel] @ long_range),
    )
    figure, axes = plt.subplots(1, 5, figsize=(16, 4.3), layout="constrained")
    figure.suptitle("Whom the pixel in the green circle attends: the brighter, the more", fontsize=15)
    axes[0].imshow(photo)
    axes[0].set_title(f"a photograph\n{height} by {width} pixels, P = {p}", fontsize=13)
    for panel, (title, weights) in zip(axes[1:], panels, strict=True):
        share = (weights / weights.max()).view(height, width).numpy()
        shadow = 0.35 * photo.mean(-1, keepdims=True)
        panel.imshow(np.where(share[..., None] > FAINT, heat(strengths(share))[..., :3], shadow))
        panel.set_title(f"{title}\n{int((weights > 0).sum())} keys", fontsize=13)
    bar = figure.colorbar(ScalarMappable(strengths, heat), ax=axes, ticks=(FAINT, 0.1, 0.25, 0.5, 1), format="{x:g}")
    bar.set_label(
        f"weight, in parts of the panel's largest\n(less than {FAINT:g}: the photograph in grey)", fontsize=11
    )
    for panel in axes:
        panel.scatter(x, y, s=70, facecolors="none", edgecolors="#56FF89", linewidths=2)
        panel.set_xticks([])
        panel.set_yticks([])
    return figure


def _features(photo: Tensor, colour: float = 0.15, position: float = 0.4) -> tuple[Tensor, Tensor]:
    """q, k [1, H, W, 1, 6] of an image [H, W, 3]: q k^T is minus half a squared distance, plus a constant a query.

    The distance is that of colours and positions, in units of `colour` (of full brightness) and `position` (of H).
    """
    height, width, _ = photo.shape
    y, x = torch.meshgrid(torch.arange(height) / height, torch.arange(width) / height, indexing="ij")
    features = torch.cat([photo / colour, torch.stack([y, x], -1) / position], -1)
    norm = -features.square().sum(-1, keepdim=True) / 2
    q, k = torch.cat([features, torch.ones_like(norm)], -1), torch.cat([features, norm], -1)
    return q[None, :, :, None], k[None, :, :, None]


PICTURES = {
    "partitions": draw_partitions,
    "constructors": draw_constructors,
    "supports": draw_supports,
    "photo": draw_photo,
}
