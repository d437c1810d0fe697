"""``python -m bench accuracy``: what long-range context buys, on tasks that cannot be solved without it.

`bench/tasks.py` draws the images; the class of a pixel depends on what lies far from it. A backbone of two 3x3
convolutions sees two pixels far, the network behind it has to fetch the rest: a head that labels pixels, or, as the
paper does it in a classifier, ISA blocks inside a network that labels whole images.

In the task of the keys, what a head can connect bounds what it can learn: a pixel that the key does not reach can only
guess, so of the share s of pixels reached and c classes, accuracy is s + (1 - s) / c at best, up to luck: its ceiling.
Both stages of ISA together reach every pixel, one alone does not; that is the paper's argument, and here is where it is
tested.

All networks of a task see the same images in the same order, for as many steps; accuracy is over what is labelled in
images that no training has seen.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Generator, Tensor, nn

import reference
from bench import opponents
from bench.arguments import folder, positive
from bench.commands.paper import parameters
from bench.records import write_whole
from bench.tasks import IGNORED, SIZE, TASKS, Drawn, Task
from isa_triton import ISAModule, SelfAttention2d
from isa_triton.models.block import ISABlock
from reference.attention import Groups

HELP = "tasks that need long-range context, learned with every head: accuracy.csv, accuracy_*.png"
SIGHT = 5  # pixels across, what two 3x3 convolutions see
CHANNELS, KEYS = 32, 16  # widths of maps and values, and of keys

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


def share_reached(stages: Sequence[Stage], classes: Tensor, evidence: Tensor) -> float:
    """The share of the labelled pixels that the evidence reaches through the backbone and these stages."""
    known = F.max_pool2d(evidence.float().unsqueeze(1), SIGHT, 1, SIGHT // 2).squeeze(1).bool()
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
        CHANNELS, KEYS, CHANNELS, CHANNELS, partition_size=[(p, p) for p in sizes], dropout=0.0, order=order
    )


@dataclass(frozen=True)
class Head:
    """A module between maps of `CHANNELS`, and the stages by which it passes on what a pixel knows."""

    build: Callable[[], nn.Module]
    stages: Sequence[Stage]


HEADS = {
    "none": Head(nn.Identity, ()),
    "NL": Head(partial(opponents.FusedNonLocal, CHANNELS), (everywhere,)),
    "SA": Head(partial(opponents.FusedSA, CHANNELS, KEYS, CHANNELS, CHANNELS, dropout=0.0), (everywhere,)),
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


def head_network(head: str, task: Task) -> nn.Module:
    """A backbone that sees `SIGHT` pixels, a head, and a classifier of pixels: [B, C, H, W] -> [B, classes, H, W]."""
    return nn.Sequential(
        *backbone(task),
        HEADS[head].build(),
        reference.ConvNormReLU(CHANNELS, CHANNELS),
        nn.Conv2d(CHANNELS, task.classes, 1),
    )


def block_network(blocks: int, task: Task) -> nn.Module:
    """The backbone, three 1x1 convolutions, ISA blocks (residual) behind the first `blocks` of them, and a classifier
    of images: [B, C, H, W] -> [B, classes].
    """
    layers: list[nn.Module] = []
    for place in range(3):
        layers.append(reference.ConvNormReLU(CHANNELS, CHANNELS))
        if place < blocks:
            layers.append(ISABlock(CHANNELS, KEYS, CHANNELS))
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, task.classes)
    return nn.Sequential(*backbone(task), *layers, *pooled)


def backbone(task: Task) -> tuple[nn.Module, nn.Module]:
    return reference.ConvNormReLU(task.channels, CHANNELS, 3), reference.ConvNormReLU(CHANNELS, CHANNELS, 3)


# -- what is asked -----------------------------------------------------------------------------------------------------

Build = Callable[[Task], nn.Module]


class Experiment(NamedTuple):
    """Networks that learn one task, for so many steps unless told otherwise; those of `quick` for a first look."""

    task: str
    networks: Mapping[str, Build]
    quick: tuple[str, ...]
    steps: int
    of_images: bool = False  # one class an image in place of one a pixel


def with_heads(*names: str) -> dict[str, Build]:
    return {name: partial(head_network, name) for name in names}


EXPERIMENTS = {
    "keys": Experiment("keys", with_heads(*HEADS), ("none", "dense", "ISA", "long", "short"), 400),
    "mosaics": Experiment("mosaics", with_heads("none", "dense", "ISA", "long", "short"), ("none", "ISA"), 200),
    "blocks": Experiment(
        "mosaics",
        {
            "no block": partial(block_network, 0),
            "1 block": partial(block_network, 1),
            "3 blocks": partial(block_network, 3),
        },
        ("no block", "1 block"),
        200,
        of_images=True,
    ),
}
QUESTIONS = {  # a plot each: its title, the experiment that answers it, and whom it shows
    "heads": (
        "Keys: ISA against what it is compared with",
        "keys",
        ("none", "NL", "SA", "RCCA", "CGNL", "dense", "ISA"),
    ),
    "stages": (
        "Keys: the order of the stages, and one alone (twice: with the parameters of both)",
        "keys",
        ("none", "ISA", "short-long", "long", "long twice", "short", "short twice", "dense"),
    ),
    "partition_sizes": ("Keys: the partition size", "keys", ("ISA P=2", "ISA P=4", "ISA", "ISA P=4, 8")),
    "mosaics": ("Mosaics of digits: the class of a stroke", "mosaics", tuple(EXPERIMENTS["mosaics"].networks)),
    "blocks": ("Mosaics of digits: ISA blocks in a classifier", "blocks", tuple(EXPERIMENTS["blocks"].networks)),
}

# -- runs --------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """One network, one seed: it decides the images and the first weights."""

    experiment: str
    network: str
    seed: int
    steps: int


@dataclass(frozen=True)
class Row:
    """What one network learned from one seed."""

    experiment: str
    network: str
    seed: int
    steps: int
    parameters: int
    reached: float | None  # share of pixels, where it is known what decides
    ceiling: float | None  # of accuracy
    accuracy: float
    cpu_seconds: float


def learn(run: Run, batch: int = 16, rate: float = 0.003, tested: int = 256) -> Row:
    """Train a network from scratch and test it."""
    start = time.process_time()
    experiment = EXPERIMENTS[run.experiment]
    task, generator = TASKS[experiment.task], Generator().manual_seed(run.seed)

    def draw(count: int, unseen: bool) -> Drawn:
        drawn = task.draw(count, generator, unseen)
        return drawn._replace(classes=drawn.classes.amax((1, 2))) if experiment.of_images else drawn

    test = draw(tested, True)
    torch.manual_seed(run.seed)
    model = experiment.networks[run.network](task).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=run.steps)
    for _ in range(run.steps):
        x, y, _ = draw(batch, False)
        loss = F.cross_entropy(model(x), y, ignore_index=IGNORED)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(x).argmax(1) for x in test.images.split(batch)])
    reached = ceiling = None
    if test.evidence is not None:
        reached = round(share_reached(HEADS[run.network].stages, test.classes, test.evidence), 4)
        ceiling = round(reached + (1 - reached) / task.classes, 4)
    accuracy = round(float((found == test.classes)[test.classes != IGNORED].float().mean()), 4)
    seconds = round(time.process_time() - start, 1)
    return Row(*run, parameters(model), reached, ceiling, accuracy, seconds)


def learn_all(runs: Sequence[Run], workers: int) -> Iterator[Row]:
    """`learn` every run, in so many processes of one thread each: networks this small fill one."""
    if workers == 1:
        yield from map(learn, runs)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))
    with pool:
        yield from pool.map(learn, runs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=folder, default="out", metavar="DIR", help="folder of the results (default: out)")
    add("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="default: all")
    names = list(dict.fromkeys(name for experiment in EXPERIMENTS.values() for name in experiment.networks))
    add("--networks", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)} (default: all)")
    add("--seeds", type=positive, metavar="N", help="runs of every network (default: 3; 1 with --quick)")
    steps = ", ".join(f"{experiment.steps} of {name}" for name, experiment in EXPERIMENTS.items())
    add("--steps", type=positive, help=f"training steps of a run (default: {steps})")
    add("--workers", type=positive, default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    add("--quick", action="store_true", help="one seed of a few networks unless told otherwise")


def plan(args: argparse.Namespace) -> list[Run]:
    """What the arguments ask for, seed by seed.

    Raises:
        argparse.ArgumentError: nothing, or what needs a package that is missing.
    """
    runs = []
    for seed in range(args.seeds or (1 if args.quick else 3)):
        for name in dict.fromkeys(args.experiments):
            experiment = EXPERIMENTS[name]
            asked = args.networks or (experiment.quick if args.quick else experiment.networks)
            steps = args.steps or experiment.steps
            runs += [Run(name, network, seed, steps) for network in experiment.networks if network in asked]
    if not runs:
        chosen = ", ".join(args.experiments)
        raise argparse.ArgumentError(None, f"--networks: none of {', '.join(args.networks)} takes part in {chosen}")
    if any(EXPERIMENTS[run.experiment].task == "mosaics" for run in runs) and not find_spec("sklearn"):
        message = (
            "the digits are scikit-learn's, which is missing: pip install scikit-learn, or ask for --experiments keys"
        )
        raise argparse.ArgumentError(None, message)
    return runs


def run(args: argparse.Namespace) -> None:
    console = Console()
    console.width = max(console.width, 90)  # rather wrapped by the terminal than cut off
    rows: list[Row] = []
    path = args.out / "accuracy.csv"
    for row in learn_all(plan(args), args.workers):
        rows.append(row)
        said = f"seed {row.seed}, {row.experiment}, {row.network}: {row.accuracy:.3f} in {row.cpu_seconds:.0f} CPU s"
        console.print(said, highlight=False)
        write_whole(path, tuple(Row.__dataclass_fields__), (tuple(asdict(row).values()) for row in rows))
    for name in dict.fromkeys(row.experiment for row in rows):
        console.print(table([row for row in rows if row.experiment == name]))
    written = [path]
    for name, (title, experiment, networks) in QUESTIONS.items():
        if asked := [
            row for network in networks for row in rows if (row.experiment, row.network) == (experiment, network)
        ]:
            written.append(args.out / f"accuracy_{name}.png")
            plot(asked, title, written[-1])
    console.print("Wrote", *written, sep="\n  ", highlight=False)


def chance(experiment: str) -> float:
    """The accuracy of a guess."""
    return 1 / TASKS[EXPERIMENTS[experiment].task].classes


def table(rows: Sequence[Row]) -> Table:
    """A line a network: mean accuracy and spread (standard deviation) over the seeds, beside its ceiling."""
    name = rows[0].experiment
    title = f"{name}: accuracy after {rows[0].steps} steps; a guess is right in 1 of {round(1 / chance(name))}"
    result = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("network", "parameters", "reached", "ceiling", "accuracy", "spread", "seeds", "CPU s a run"):
        result.add_column(column, justify="left" if column == "network" else "right", no_wrap=True)
    for network in dict.fromkeys(row.network for row in rows):
        runs = [row for row in rows if row.network == network]
        accuracies = [row.accuracy for row in runs]
        result.add_row(
            network,
            f"{runs[0].parameters:,}",
            mean("{:.2f}", [row.reached for row in runs]),
            mean("{:.3f}", [row.ceiling for row in runs]),
            mean("{:.3f}", accuracies),
            f"{statistics.stdev(accuracies):.3f}" if len(runs) > 1 else "-",
            str(len(runs)),
            mean("{:.0f}", [row.cpu_seconds for row in runs]),
        )
    return result


def mean(form: str, values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return form.format(statistics.mean(known)) if known else "-"


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw a network a line: a dot for every seed, a bar to their mean, and a mark at the ceiling."""
    networks = list(dict.fromkeys(row.network for row in rows))
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.42 * len(networks)), layout="constrained")
    for network in networks:
        runs = [row for row in rows if row.network == network]
        accuracies, ceilings = [row.accuracy for row in runs], [row.ceiling for row in runs if row.ceiling is not None]
        colour = "#0072B2" if network.startswith("ISA") else "0.75"
        axes.barh(network, statistics.mean(accuracies), color=colour, height=0.6)
        axes.plot(accuracies, [network] * len(runs), "o", color="black", markersize=4, label="a seed")
        if ceilings:
            style = {"color": "#D55E00", "markersize": 20, "markeredgewidth": 2.5}
            label = "ceiling: what the head's reach allows"
            axes.plot([statistics.mean(ceilings)], [network], "|", label=label, **style)
    axes.axvline(chance(rows[0].experiment), color="0.4", linewidth=1, linestyle=(0, (2, 2)), label="a guess")
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.02), xlabel="accuracy on images that no training has seen")
    figure.suptitle(title, fontsize=12)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one of each kind
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
