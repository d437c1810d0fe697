"""Training from the data on to checkpoint.pt and log.csv, until it is done or a signal comes; evaluation to iou.csv."""

from __future__ import annotations

import argparse
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from bench.records import format_size, read, table, write
from bench.train.data import DATA_SETS, RandomSamples, Samples, batches
from bench.train.evaluation import intersection_over_union, probabilities
from bench.train.recipe import InputError, Recipe
from bench.train.trainer import Process, Trainer, read_checkpoint


@dataclass(frozen=True)
class Iteration:
    """A line of log.csv: the mean loss of all processes, and how long loading and learning took."""

    iteration: int
    learning_rate: float
    loss: float
    seconds: float


@dataclass(frozen=True)
class IoU:
    """A line of iou.csv: a class, or "mean"; None where neither predictions nor labels have it."""

    class_: str
    iou: float | None


def train(recipe: Recipe, args: argparse.Namespace, process: Process, console: Console) -> Trainer:
    """Train until the recipe is fulfilled or a signal comes, from the checkpoint in --out on if there is one."""
    data = DATA_SETS[recipe.data_set]
    paths = data.paths(args.data, "train")
    data.paths(args.data, "val")  # missing ones are better noticed before training than after
    checkpoint, log = args.out / "checkpoint.pt", args.out / "log.csv"
    saved = read_checkpoint(checkpoint, process.device) if checkpoint.exists() else None
    if saved and saved["recipe"] != recipe:
        raise InputError(f"{checkpoint} was trained {difference(saved['recipe'], recipe)}: give another --out")
    trainer = Trainer(recipe, process, saved)
    try:
        rows = [row for row in read(log, Iteration) if row.iteration <= trainer.iteration]
    except ValueError as error:
        raise InputError(str(error)) from error
    loader = DataLoader(
        RandomSamples(data, paths, recipe),
        batch_sampler=batches(trainer.iteration, recipe, process.rank, process.world_size),
        num_workers=args.workers,
        pin_memory=process.device.type == "cuda",
        worker_init_fn=leave_process_group,
    )
    bar = progress(console, "iteration", "loss {task.fields[loss]:.4f}")
    task = bar.add_task("", total=recipe.iterations, completed=trainer.iteration, loss=math.nan)
    with stop_signals() as asked, bar:
        console.print(
            f"{recipe.head} on {recipe.backbone}, {recipe.data_set} with {len(paths)} images: {recipe.iterations}"
            f" iterations of {recipe.batch} crops of {format_size(recipe.crop)}, learning rate {recipe.lr},"
            f" weight decay {recipe.weight_decay}"
            + (f"; goes on after iteration {trainer.iteration}" if saved else ""),
            highlight=False,
            soft_wrap=True,
        )
        begin = time.perf_counter()
        for images, labels in loader:
            loss = trainer.step(images, labels)
            total, stopping = process.sum(loss, torch.tensor(asked.is_set()))
            mean, end = total / process.world_size, time.perf_counter()
            if not math.isfinite(mean):
                raise InputError(f"the loss became {mean} in iteration {trainer.iteration}: try a lower --lr")
            rate = recipe.learning_rate(trainer.iteration - 1)
            rows.append(Iteration(trainer.iteration, rate, mean, round(end - begin, 4)))
            bar.update(task, advance=1, loss=mean)
            begin = end
            done = stopping or trainer.iteration == recipe.iterations
            if process.rank == 0 and (done or trainer.iteration % args.save_every == 0):
                write(log, Iteration, rows)  # first: a run that goes on drops what the checkpoint does not know
                trainer.save(checkpoint)
            if stopping:
                console.print(f"Stopped after iteration {trainer.iteration}; the same command goes on", highlight=False)
                break
    console.print("Wrote", log, checkpoint, sep="\n  ", highlight=False)
    return trainer


def difference(saved: Recipe, wanted: Recipe) -> str:
    """What is not the same in two recipes."""
    values = {field.name: (getattr(saved, field.name), getattr(wanted, field.name)) for field in fields(Recipe)}
    return ", ".join(f"with {name} {old}, not {new}" for name, (old, new) in values.items() if old != new)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, the first time; the second time they do what they always did."""
    asked = threading.Event()

    def handle(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_process_group(worker: int) -> None:
    """What Ctrl-C and torchrun send to the whole group is no business of a process that loads images."""
    if os.name == "posix":
        os.setpgrp()


def progress(console: Console, what: str, more: str = "") -> Progress:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(more), TimeRemainingColumn())
    return Progress(*columns, console=console)


def evaluate(network: nn.Module, recipe: Recipe, args: argparse.Namespace, process: Process, console: Console) -> None:
    """Mean IoU over the validation images, printed and written to iou.csv."""
    data = DATA_SETS[recipe.data_set]
    images = Samples(data, data.paths(args.data, "val"))
    mine = Subset(images, range(process.rank, len(images), process.world_size))
    loader = DataLoader(mine, batch_size=None, num_workers=args.workers, worker_init_fn=leave_process_group)
    mirror = data.mirror[: len(data.ids)].to(process.device) if args.flip else None
    network.eval()

    def predicted() -> Iterator[tuple[Tensor, Tensor]]:
        for image, label in bar.track(loader, total=len(mine)):
            x = image.unsqueeze(0).to(process.device)
            y = probabilities(lambda x: network(x)["out"], x, recipe.crop, args.scales, mirror)
            yield y[0].argmax(0), label.to(process.device)

    with torch.inference_mode(), recipe.autocast(process.device), progress(console, "evaluated") as bar:
        ious, mean = intersection_over_union(predicted(), len(data.ids), process.device)
    scales = " ".join(f"{scale:g}" for scale in args.scales) + (", flipped and not" if args.flip else "")
    console.print(f"{len(images)} images in windows of {format_size(recipe.crop)}, scaled by {scales}", highlight=False)
    rows = [*map(IoU, data.names, ious), IoU("mean", mean)]
    shown = table("", ("class", "IoU"), [(row.class_, None if row.iou is None else f"{row.iou:.4f}") for row in rows])
    shown.rows[-2].end_section = True
    console.print(shown)
    if process.rank == 0:
        write(args.out / "iou.csv", IoU, rows)
    console.print(f"Wrote {args.out / 'iou.csv'}", highlight=False)
