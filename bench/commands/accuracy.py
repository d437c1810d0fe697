"""``python -m bench accuracy``: what long-range context buys, on a task that cannot be solved without it.

Every image has grey rectangles on noise and, somewhere, one pixel of a colour: the key. The class of a rectangle's
pixels is the key's colour. A backbone of two 3x3 convolutions sees two pixels far; the head behind it has to fetch the
rest. What a head can connect bounds what it can learn: a pixel that the key does not reach can only guess, so of the
share s of pixels reached and c colours, accuracy is s + (1 - s) / c at best, up to luck: its ceiling. Both stages of
ISA together reach every pixel, one alone does not; that is the paper's argument, and here is where it is tested.

All heads see the same images in the same order, for as many steps; accuracy is over the rectangles' pixels of images
that no training has seen.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product, starmap
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import reference
from bench import opponents
from bench.arguments import folder, positive
from bench.commands.paper import parameters
from bench.results import write_whole
from isa_triton import ISAModule, SelfAttention2d
from reference.attention import Groups

HELP = "a task that needs long-range context, learned with every head: accuracy.csv, accuracy_*.png"
SIZE = (24, 32)  # of the images and of every map
COLOURS = torch.eye(3)  # red, green and blue
SIGHT = 5  # pixels across, what two 3x3 convolutions see
CHANNELS, KEYS = 32, 16  # widths of maps and values, and of keys
IGNORED = -1  # the class of pixels outside the rectangles

# -- the task ----------------------------------------------------------------------------------------------------------


def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Images [count, 3, H, W], classes [count, H, W], and where the keys are [count, H, W]."""
    H, W = SIZE

    def uniform(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    images = 0.3 * torch.rand(count, 3, H, W, generator=generator)
    classes = torch.full((count, H, W), IGNORED)
    keys = torch.zeros(count, H, W, dtype=torch.bool)
    for image, class_, key in zip(images, classes, keys, strict=True):
        colour = uniform(0, len(COLOURS))
        for _ in range(4):
            h, w = uniform(3, 9), uniform(3, 9)
            top, left = uniform(0, H - h + 1), uniform(0, W - w + 1)
            image[:, top : top + h, left : left + w] = 1
            class_[top : top + h, left : left + w] = colour
        y, x = uniform(0, H), uniform(0, W)
        image[:, y, x] = 2 * COLOURS[colour]
        class_[y, x], key[y, x] = IGNORED, True
    return images + 0.05 * torch.randn(images.shape, generator=generator), classes, keys


# -- what a head connects ----------------------------------------------------------------------------------------------

Stage = Callable[[Tensor], Tensor]  # from where something is known, [B, H, W], to where it is after one attention


def within(groups: Groups, partition_size: tuple[int, int], known: Tensor) -> Tensor:
    """What one pixel of a group knows, all do."""
    known = known.clone()
    for rows, columns in groups(*SIZE, partition_size):
        known[:, rows, columns] = known[:, rows, columns].amax((1, 2), keepdim=True)
    return known


def long_range(p: int) -> Stage:
    return partial(within, reference.long_range_groups, (p, p))


def short_range(p: int) -> Stage:
    return partial(within, reference.short_range_groups, (p, p))


def everywhere(known: Tensor) -> Tensor:
    return within(reference.short_range_groups, SIZE, known)


def criss_cross(known: Tensor) -> Tensor:
    row, column = ((1, SIZE[1]), (SIZE[0], 1))
    return within(reference.short_range_groups, row, known) | within(reference.short_range_groups, column, known)


def share_reached(stages: Sequence[Stage], classes: Tensor, keys: Tensor) -> float:
    """The share of the rectangles' pixels that the key reaches through the backbone and these stages."""
    known = F.max_pool2d(keys.float().unsqueeze(1), SIGHT, 1, SIGHT // 2).squeeze(1).bool()
    for stage in stages:
        known = stage(known)
    return float(known[classes != IGNORED].float().mean())


# -- heads -------------------------------------------------------------------------------------------------------------


class Beside(nn.Module):
    """Attention beside its input, fused by conv1x1 + BN + ReLU, as the ISA module has it, for any patterns."""

    def __init__(self, *patterns: str, p: int = 8) -> None:
        super().__init__()
        stages = (SelfAttention2d(CHANNELS, KEYS, CHANNELS, pattern=q, partition_size=(p, p)) for q in patterns)
        self.stages, self.fuse = nn.Sequential(*stages), reference.ConvNormReLU(2 * CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(torch.cat([x, self.stages(x)], 1))


def isa(*sizes: int, order: str = "long-short") -> ISAModule:
    """The ISA module with these partition sizes."""
    return ISAModule(
        CHANNELS, KEYS, CHANNELS, CHANNELS, partition_sizes=[(p, p) for p in sizes], dropout=0.0, order=order
    )


@dataclass(frozen=True)
class Head:
    """A module between maps of `CHANNELS`, and the stages by which it passes on what a pixel knows."""

    build: Callable[[], nn.Module]
    stages: Sequence[Stage]


HEADS = {
    "none": Head(nn.Identity, ()),
    "NL": Head(partial(opponents.FusedNonLocal, CHANNELS), (everywhere,)),
    "SA": Head(partial(reference.SA, CHANNELS, KEYS, CHANNELS, CHANNELS, dropout=0.0), (everywhere,)),
    "RCCA": Head(partial(opponents.FusedRCCA, CHANNELS), (criss_cross, criss_cross)),
    "CGNL": Head(partial(reference.CGNL, CHANNELS), (everywhere,)),
    "dense": Head(partial(Beside, "dense"), (everywhere,)),
    "ISA": Head(partial(isa, 8), (long_range(8), short_range(8))),
    "short-long": Head(partial(isa, 8, order="short-long"), (short_range(8), long_range(8))),
    "long": Head(partial(Beside, "interlaced"), (long_range(8),)),
    "short": Head(partial(Beside, "local"), (short_range(8),)),
    "long twice": Head(partial(Beside, "interlaced", "interlaced"), (long_range(8),)),
    "short twice": Head(partial(Beside, "local", "local"), (short_range(8),)),
    "ISA P=2": Head(partial(isa, 2), (long_range(2), short_range(2))),
    "ISA P=4": Head(partial(isa, 4), (long_range(4), short_range(4))),
    "ISA P=4, 8": Head(partial(isa, 4, 8), (long_range(8), short_range(8))),
}
QUICK = ("none", "dense", "ISA", "long", "short")
QUESTIONS = {  # a plot each
    "heads": ("ISA against what it is compared with", ("none", "NL", "SA", "RCCA", "CGNL", "dense", "ISA")),
    "stages": (
        "The order of the stages, and one alone (twice: with the parameters of both)",
        ("none", "ISA", "short-long", "long", "long twice", "short", "short twice", "dense"),
    ),
    "partition_sizes": ("The partition size", ("ISA P=2", "ISA P=4", "ISA", "ISA P=4, 8")),
}


def network(head: str) -> nn.Sequential:
    """A backbone that sees `SIGHT` pixels, a head, and a classifier of pixels: [B, 3, H, W] -> [B, colours, H, W]."""
    return nn.Sequential(
        reference.ConvNormReLU(3, CHANNELS, 3),
        reference.ConvNormReLU(CHANNELS, CHANNELS, 3),
        HEADS[head].build(),
        reference.ConvNormReLU(CHANNELS, CHANNELS),
        nn.Conv2d(CHANNELS, len(COLOURS), 1),
    )


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one head learned from one seed."""

    head: str
    seed: int
    steps: int
    parameters: int
    reached: float  # share of pixels
    ceiling: float  # of accuracy
    accuracy: float
    seconds: float


def learn(head: str, seed: int, steps: int, batch: int = 16, rate: float = 0.003, tested: int = 256) -> Row:
    """Train a head from scratch and test it; the seed decides the images and the first weights."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    images, classes, keys = draw(tested, generator)
    torch.manual_seed(seed)
    model = network(head).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps)
    for _ in range(steps):
        x, y, _ = draw(batch, generator)
        loss = F.cross_entropy(model(x), y, ignore_index=IGNORED)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(x).argmax(1) for x in images.split(batch)])
    reached = share_reached(HEADS[head].stages, classes, keys)
    return Row(
        head,
        seed,
        steps,
        parameters(model),
        reached=round(reached, 4),
        ceiling=round(reached + (1 - reached) / len(COLOURS), 4),
        accuracy=round(float((found == classes)[classes != IGNORED].float().mean()), 4),
        seconds=round(time.perf_counter() - start, 1),
    )


def learn_all(runs: Sequence[tuple[str, int, int]], workers: int) -> Iterator[Row]:
    """`learn` for every (head, seed, steps), in so many processes of one thread each: networks this small fill one."""
    if workers == 1:
        yield from starmap(learn, runs)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
    with pool:
        yield from pool.map(learn, *zip(*runs, strict=True))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=folder, default="out", metavar="DIR", help="folder of the results (default: out)")
    add("--heads", nargs="+", choices=HEADS, metavar="NAME", help=f"of {', '.join(HEADS)} (default: all)")
    add("--seeds", type=positive, metavar="N", help="runs of every head (default: 3; 1 with --quick)")
    add("--steps", type=positive, default=400, help="training steps of a run (default: 400)")
    add("--workers", type=positive, default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    add("--quick", action="store_true", help=f"one seed of {', '.join(QUICK)} unless told otherwise")


def run(args: argparse.Namespace) -> None:
    console = Console()
    console.width = max(console.width, 90)  # rather wrapped by the terminal than cut off
    names = args.heads or (QUICK if args.quick else tuple(HEADS))
    seeds = range(args.seeds or (1 if args.quick else 3))
    runs = [(name, seed, args.steps) for seed, name in product(seeds, dict.fromkeys(names))]
    rows: list[Row] = []
    path = args.out / "accuracy.csv"
    for row in learn_all(runs, args.workers):
        rows.append(row)
        console.print(f"seed {row.seed}, {row.head}: {row.accuracy:.3f} in {row.seconds:.0f} s", highlight=False)
        write_whole(path, tuple(Row.__dataclass_fields__), (tuple(asdict(row).values()) for row in rows))
    console.print(table(rows))
    written = [path]
    for name, (title, heads) in QUESTIONS.items():
        if asked := [row for head in heads for row in rows if row.head == head]:
            written.append(args.out / f"accuracy_{name}.png")
            plot(asked, title, written[-1])
    console.print("Wrote", *written, sep="\n  ", highlight=False)


def table(rows: Sequence[Row]) -> Table:
    """A line a head: mean accuracy and spread (standard deviation) over the seeds, beside its ceiling."""
    title = f"Accuracy after {rows[0].steps} steps; a guess is right in 1 of {len(COLOURS)}"
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("head", "parameters", "reached", "ceiling", "accuracy", "spread", "seeds", "s a run"):
        result.add_column(column, justify="left" if column == "head" else "right", no_wrap=True)
    for head in dict.fromkeys(row.head for row in rows):
        runs = [row for row in rows if row.head == head]
        accuracies = [row.accuracy for row in runs]
        result.add_row(
            head,
            f"{runs[0].parameters:,}",
            f"{statistics.mean(row.reached for row in runs):.2f}",
            f"{statistics.mean(row.ceiling for row in runs):.3f}",
            f"{statistics.mean(accuracies):.3f}",
            f"{statistics.stdev(accuracies):.3f}" if len(runs) > 1 else "-",
            str(len(runs)),
            f"{statistics.mean(row.seconds for row in runs):.0f}",
        )
    return result


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw a head a line: a dot for every seed, a bar to their mean, and a mark at the ceiling."""
    heads = list(dict.fromkeys(row.head for row in rows))
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.42 * len(heads)), layout="constrained")
    for head in heads:
        runs = [row for row in rows if row.head == head]
        first, accuracies = head == heads[0], [row.accuracy for row in runs]
        axes.barh(head, statistics.mean(accuracies), color="#0072B2" if head.startswith("ISA") else "0.75", height=0.6)
        axes.plot(accuracies, [head] * len(runs), "o", color="black", markersize=4, label="a seed" if first else None)
        ceiling = statistics.mean(row.ceiling for row in runs)
        label = "ceiling: what the head's reach allows" if first else None
        axes.plot([ceiling], [head], "|", color="#D55E00", markersize=20, markeredgewidth=2.5, label=label)
    axes.axvline(1 / len(COLOURS), color="0.4", linewidth=1, linestyle=(0, (2, 2)), label="a guess")
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.02), xlabel="accuracy on the rectangles' pixels")
    figure.suptitle(title, fontsize=12)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
