"""``python -m bench accuracy``: what long-range context buys, on tasks that cannot be solved without it.

`experiments.py` draws the images; the class of a pixel depends on what lies far from it. A backbone of two 3x3
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import Generator

from bench import records, terminal
from bench.accuracy.experiments import EXPERIMENTS, HEADS, IGNORED, MOSAICS, QUESTIONS, Drawn, Question, share_reached
from bench.arguments import add_out, positive
from bench.figures import LOOKS, STAGE_LOOKS
from bench.terminal import Table, Terminal

_PROVIDERS = {"dense": "dense", "NL": "nonlocal", "SA": "sa", "RCCA": "rcca", "CGNL": "cgnl"}
COLOURS = {name: LOOKS[provider].colour for name, provider in _PROVIDERS.items()}  # as everywhere; others are grey
COLOURS |= {f"{name}{twice}": look.colour for name, look in STAGE_LOOKS.items() for twice in ("", " twice")}
COLOURS |= dict.fromkeys(("ISA", "1 block", "3 blocks"), LOOKS["isa"].colour)


@dataclass(frozen=True)
class Run:
    """One network, one seed: it decides the images and the first weights."""

    experiment: str
    network: str
    seed: int
    steps: int


@dataclass(frozen=True)
class Row(Run):
    """What one network learned from one seed."""

    parameters: int
    reached: float | None  # share of pixels, where it is known what decides
    ceiling: float | None  # of accuracy
    accuracy: float
    cpu_seconds: float


def learn(run: Run, batch: int = 16, rate: float = 0.003, tested: int = 256) -> Row:
    """Train a network from scratch and test it."""
    start = time.process_time()
    experiment = EXPERIMENTS[run.experiment]
    task, generator = experiment.task, Generator().manual_seed(run.seed)

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
    return Row(
        **asdict(run),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        reached=reached,
        ceiling=ceiling,
        accuracy=round(float((found == test.classes)[test.classes != IGNORED].float().mean()), 4),
        cpu_seconds=round(time.process_time() - start, 1),
    )


def learn_all(runs: Sequence[Run], workers: int) -> Iterator[Row]:
    """`learn` every run, in so many processes of one thread each: networks this small fill one."""
    if workers == 1:
        yield from map(learn, runs)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(learn, runs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_out(parser)
    add("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS), help="what is learned")
    names = list(dict.fromkeys(name for experiment in EXPERIMENTS.values() for name in experiment.networks))
    add("--networks", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)} (default: all)")
    add("--seeds", type=positive, metavar="N", help="runs of every network (default: 3; 1 with --quick)")
    steps = ", ".join(f"{experiment.steps} of {name}" for name, experiment in EXPERIMENTS.items())
    add("--steps", type=positive, metavar="N", help=f"training steps of a run (default: {steps})")
    add("--workers", type=positive, default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    add("--quick", action="store_true", help="one seed of a few networks unless told otherwise")
    terminal.add_arguments(parser)


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
    if any(EXPERIMENTS[run.experiment].task is MOSAICS for run in runs) and not find_spec("sklearn"):
        missing = "the digits are scikit-learn's, which is missing: pip install scikit-learn"
        raise argparse.ArgumentError(None, f"{missing}, or ask for --experiments keys")
    return runs


def run(args: argparse.Namespace) -> None:
    said, rows, runs = Terminal(args), list[Row](), plan(args)
    written = [args.out / "accuracy.csv"]
    said.say(f"Every run is a row of {written[0]}")
    with said.progress("runs", len(runs)) as bar:
        bar.now(f"{args.workers} at a time")
        for row in learn_all(runs, args.workers):
            rows.append(row)
            result = f"{row.accuracy:.3f} in {row.cpu_seconds:.0f} CPU s"
            said.detail(f"seed {row.seed}, {row.experiment}, {row.network}: {result}")
            records.write(written[0], Row, rows)
            bar.advance()
    said.show(*(summary([row for row in rows if row.experiment == name]) for name in dict.fromkeys(args.experiments)))
    for name, question in QUESTIONS.items():
        networks = question.networks or EXPERIMENTS[question.experiment].networks
        wanted = [(question.experiment, network) for network in networks]
        if shown := [row for pair in wanted for row in rows if (row.experiment, row.network) == pair]:
            written.append(args.out / f"accuracy_{name}.png")
            plot(shown, question, written[-1])
    best = max(rows, key=lambda row: row.accuracy)
    said.end(f"Best of {len(rows)} runs: {best.network} in {best.experiment}, {best.accuracy:.3f}.", *written)


def by_network(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs of every network, in the order in which they come."""
    return {name: [row for row in rows if row.network == name] for name in dict.fromkeys(row.network for row in rows)}


def mean(form: str, values: Sequence[float | None]) -> str | None:
    """Of those that are known, formatted."""
    known = [value for value in values if value is not None]
    return form.format(statistics.mean(known)) if known else None


def summary(rows: Sequence[Row]) -> Table:
    """A line a network: mean accuracy and spread (standard deviation) over the seeds, beside its ceiling."""
    experiment, lines = rows[0].experiment, []
    for network, runs in by_network(rows).items():
        accuracies = [row.accuracy for row in runs]
        reached = mean("{:.2f}", [row.reached for row in runs])
        ceiling = mean("{:.3f}", [row.ceiling for row in runs])
        spread = f"{statistics.stdev(accuracies):.3f}" if len(runs) > 1 else None
        seconds = mean("{:.0f}", [row.cpu_seconds for row in runs])
        lines.append(
            (network, runs[0].parameters, reached, ceiling, mean("{:.3f}", accuracies), spread, len(runs), seconds)
        )
    guess = f"a guess is right in 1 of {EXPERIMENTS[experiment].task.classes}"
    header = ("network", "parameters", "reached", "ceiling", "accuracy", "spread", "seeds", "CPU s a run")
    return Table(f"{experiment}: accuracy after {rows[0].steps} steps; {guess}", header, lines)


def plot(rows: Sequence[Row], question: Question, path: Path) -> None:
    """Draw a network a line: a dot for every seed, a bar to their mean, a mark at the ceiling; the answer on top."""
    networks = by_network(rows)
    means = {network: statistics.mean(row.accuracy for row in runs) for network, runs in networks.items()}
    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.42 * len(networks)), layout="constrained")
    for network, runs in networks.items():
        axes.barh(network, means[network], color=COLOURS.get(network, "0.75"), height=0.6)
        dots = {"label": "a seed", "color": "white", "markeredgecolor": "black", "markersize": 5}
        axes.plot([row.accuracy for row in runs], [network] * len(runs), "o", **dots)
        if ceilings := [row.ceiling for row in runs if row.ceiling is not None]:
            style = {"label": "ceiling: what the head's reach allows", "color": "black", "markersize": 20}
            axes.plot([statistics.mean(ceilings)], [network], "|", markeredgewidth=2.5, **style)
    guess = 1 / EXPERIMENTS[rows[0].experiment].task.classes
    axes.axvline(guess, color="0.4", linewidth=1, linestyle=(0, (2, 2)), label="a guess")
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.02), xlabel="accuracy on images that no training has seen")
    answer = ", ".join(f"{name} {means[name]:.2f}" for name in question.answers if name in means)
    figure.suptitle("\n".join(filter(None, (question.title, answer))), fontsize=12)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one of each kind
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
