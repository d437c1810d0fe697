"""``python -m bench train``: train a segmentation network by the authors' recipe, and measure its mean IoU.

IANet on a dilated ResNet with any of the compared heads, on Cityscapes, ADE20K, LIP, VOC or COCO-Stuff from a folder.
The same command again goes on where it was. The order of the images and all chance are functions of the seed and of the
iteration, so what an interrupted run computes is what an uninterrupted one does: bit for bit on a CPU with the same
number of threads. SIGTERM and SIGINT (Ctrl-C) end the iteration and save. For several processes, on GPUs one each:

    torchrun --nproc-per-node N -m bench train ...

Batch statistics are then those of all processes, and --batch is that of all together.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from bench.arguments import device, folder, from_zero, number, positive, size
from bench.heads import CONTEXTS
from bench.records import format_size, write_whole
from bench.training import InputError
from bench.training.recipe import RECIPES, Recipe
from bench.training.run import Processes, Run, autocast, network, processes, read_checkpoint

HELP = "train a segmentation network by the authors' recipe and measure its mean IoU: checkpoint.pt, log.csv, iou.csv"
COLUMNS = ("iteration", "learning_rate", "loss", "seconds")
NEEDED = ("torchvision", "torchmetrics")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--data", type=Path, required=True, metavar="DIR", help="folder of the data set, as its publishers lay it out")
    add("--data-set", choices=RECIPES, help="which one it is, and whose recipe is followed unless told otherwise")
    add("--out", type=folder, default="out/train", metavar="DIR", help="folder of the results (default: out/train)")
    add("--evaluate", type=Path, metavar="CHECKPOINT", help="do not train: evaluate an earlier run by its own recipe")
    add("--head", choices=CONTEXTS, default="ISA", help="default: ISA; none is a fully convolutional network")
    add("--backbone", default="resnet101", metavar="NAME", help="a ResNet of torchvision (default: resnet101)")
    add(
        "--weights",
        type=named,
        default="IMAGENET1K_V1",
        metavar="NAME",
        help="its first, or none (default: IMAGENET1K_V1)",
    )
    add("--channels", type=positive, default=512, metavar="C", help="of the head (default: 512)")
    add("--partition-size", type=size, default=(8, 8), metavar="P", help="of ISA: 8 or 8x4, height first (default: 8)")
    add("--output-stride", type=int, choices=(8, 16, 32), help="(default: the recipe's)")
    add("--crop", type=size, metavar="SIZE", help="what is seen at once (default: the recipe's)")
    add("--batch", type=positive, metavar="B", help="crops in an iteration, of all processes (the recipe's)")
    add("--lr", type=number, metavar="R", help="learning rate at first (the recipe's)")
    add("--weight-decay", type=number, metavar="W", help="(the recipe's)")
    add("--iterations", type=positive, metavar="N", help="(the recipe's)")
    precisions = ("float32", "bfloat16", "float16")
    add("--precision", choices=precisions, default="float32", help="of autocast (default: float32)")
    add("--seed", type=from_zero, default=0, help="of first weights, order, augmentation and dropout (default: 0)")
    add("--scales", type=number, nargs="+", default=[1.0], metavar="S", help="of evaluated images (default: 1)")
    add("--flip", action="store_true", help="evaluate every image flipped as well")
    add("--save-every", type=positive, default=1000, metavar="N", help="iterations (default: 1000)")
    add(
        "--workers", type=from_zero, default=2, metavar="N", help="processes that load images (default: 2; 0: this one)"
    )
    add("--device", type=device, default=here, help=f"default: {here}")


def named(text: str) -> str | None:
    """A name, or "none" for None."""
    return None if text == "none" else text


def run(args: argparse.Namespace) -> None:
    if missing := [name for name in NEEDED if not find_spec(name)]:
        raise argparse.ArgumentError(None, f"needs {' and '.join(missing)}: pip install 'isa-triton[train]'")
    with processes(args.device) as here:
        console = Console(quiet=not here.first)
        console.width = max(console.width, 90)  # rather wrapped by the terminal than cut off
        try:
            if args.evaluate:
                checkpoint = read_checkpoint(args.evaluate, here.device)
                recipe = checkpoint["recipe"]
                model = network(recipe, classes(recipe)).to(here.device)
                model.load_state_dict(checkpoint["network"])
                evaluate(model, recipe, args, here, console)
            else:
                recipe = recipe_of(args, here)
                trained = train(recipe, args, here, console)
                if trained.iteration == recipe.iterations:
                    evaluate(trained.network, recipe, args, here, console)
        except InputError as error:  # where it comes from another process, its traceback comes with it
            raise argparse.ArgumentError(None, str(error).rpartition("InputError: ")[2]) from error


def recipe_of(args: argparse.Namespace, here: Processes) -> Recipe:
    """The data set's recipe with what the user says otherwise.

    Raises:
        InputError: arguments that are wrong together.
    """
    if args.data_set is None:
        raise InputError(f"--data-set must be one of {', '.join(RECIPES)}")
    names = {field.name for field in fields(Recipe)}
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    recipe = Recipe(**RECIPES[args.data_set] | given)
    if recipe.channels % 16:
        raise InputError(f"--channels must be a multiple of 16, got {recipe.channels}")
    if recipe.batch % here.count:
        raise InputError(f"--batch must be a multiple of {here.count}, the number of processes, got {recipe.batch}")
    height, width = (-(-side // recipe.output_stride) for side in recipe.crop)
    if recipe.batch * (1 if recipe.head in ("PPM", "ASPP") else height * width) < 2:
        raise InputError("--batch must be at least 2: batch normalisation of one value has no variance")
    return recipe


def classes(recipe: Recipe) -> int:
    """How many the recipe's data set has."""
    from bench.training.data import DATA_SETS

    return len(DATA_SETS[recipe.data_set].ids)


def train(recipe: Recipe, args: argparse.Namespace, here: Processes, console: Console) -> Run:
    """Train until the recipe is fulfilled or a signal comes, from the checkpoint in --out on if there is one."""
    from bench.training.data import DATA_SETS, Samples, batches

    data = DATA_SETS[recipe.data_set]
    paths = data.paths(args.data, "train")
    data.paths(args.data, "val")  # missing ones are better noticed before training than after
    checkpoint, log = args.out / "checkpoint.pt", args.out / "log.csv"
    saved = read_checkpoint(checkpoint, here.device) if checkpoint.exists() else None
    if saved and saved["recipe"] != recipe:
        raise InputError(f"{checkpoint} was trained {difference(saved['recipe'], recipe)}: give another --out")
    state = Run(recipe, len(data.ids), here, saved)
    rows = read_log(log, state.iteration)
    loader = DataLoader(
        Samples(data, paths, recipe),
        batch_sampler=list(batches(state.iteration, recipe, here.rank, here.count)),
        num_workers=args.workers,
        pin_memory=here.device.type == "cuda",
        worker_init_fn=apart,
    )
    bar = progress(console, "iteration", "loss {task.fields[loss]:.4f}")
    task = bar.add_task("", total=recipe.iterations, completed=state.iteration, loss=math.nan)
    with signals() as asked, bar:
        console.print(
            f"{recipe.head} on {recipe.backbone}, {recipe.data_set} with {len(paths)} images: {recipe.iterations}"
            f" iterations of {recipe.batch} crops of {format_size(recipe.crop)}, learning rate {recipe.lr},"
            f" weight decay {recipe.weight_decay}" + (f"; goes on after iteration {state.iteration}" if saved else ""),
            highlight=False,
            soft_wrap=True,
        )
        begin = time.perf_counter()
        for images, labels in loader:
            loss = state.step(images, labels)
            total, stopping = here.sum(loss, torch.tensor(asked.is_set()))
            mean, end = total / here.count, time.perf_counter()
            if not math.isfinite(mean):
                raise InputError(f"the loss became {mean} in iteration {state.iteration}: try a lower --lr")
            rate = recipe.learning_rate(state.iteration - 1)
            rows.append((state.iteration, rate, mean, round(end - begin, 4)))
            bar.update(task, advance=1, loss=mean)
            begin = end
            done = stopping or state.iteration == recipe.iterations
            if here.first and (done or state.iteration % args.save_every == 0):
                write_whole(log, COLUMNS, rows)  # first: a run that goes on drops what the checkpoint does not know
                state.save(checkpoint)
            if stopping:
                console.print(f"Stopped after iteration {state.iteration}; the same command goes on", highlight=False)
                break
    console.print("Wrote", log, checkpoint, sep="\n  ", highlight=False)
    return state


def difference(saved: Recipe, wanted: Recipe) -> str:
    """What is not the same in two recipes."""
    values = {field.name: (getattr(saved, field.name), getattr(wanted, field.name)) for field in fields(Recipe)}
    return ", ".join(f"with {name} {old}, not {new}" for name, (old, new) in values.items() if old != new)


def read_log(path: Path, iterations: int) -> list[tuple[Any, ...]]:
    """The lines of a log up to some iteration."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [tuple(row) for row in list(csv.reader(file))[1:] if int(row[0]) <= iterations]


@contextmanager
def signals() -> Iterator[threading.Event]:
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


def apart(worker: int) -> None:
    """A process that loads images leaves the group: what Ctrl-C and torchrun send to all of it is not its business."""
    if os.name == "posix":
        os.setpgrp()


def progress(console: Console, what: str, more: str = "") -> Progress:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(more), TimeRemainingColumn())
    return Progress(*columns, console=console)


def evaluate(model: nn.Module, recipe: Recipe, args: argparse.Namespace, here: Processes, console: Console) -> None:
    """Mean IoU over the validation images, printed and written to iou.csv."""
    from bench.training.data import DATA_SETS, Whole
    from bench.training.evaluate import intersection_over_union, probabilities

    data = DATA_SETS[recipe.data_set]
    images = Whole(data, data.paths(args.data, "val"))
    mine = Subset(images, range(here.rank, len(images), here.count))
    loader = DataLoader(mine, batch_size=None, num_workers=args.workers, worker_init_fn=apart)
    mirror = data.mirror[: len(data.ids)].to(here.device) if args.flip else None
    model.eval()

    def logits(x: Tensor) -> Tensor:
        with autocast(recipe, here.device):
            return model(x)["out"]

    def predicted() -> Iterator[tuple[Tensor, Tensor]]:
        for image, label in bar.track(loader, total=len(mine)):
            x = image.unsqueeze(0).to(here.device)
            yield probabilities(logits, x, recipe.crop, args.scales, mirror)[0].argmax(0), label.to(here.device)

    with torch.inference_mode(), progress(console, "evaluated") as bar:
        ious, mean = intersection_over_union(predicted(), len(data.ids), here.device)
    scales = " ".join(f"{scale:g}" for scale in args.scales) + (", flipped and not" if args.flip else "")
    console.print(f"{len(images)} images in windows of {format_size(recipe.crop)}, scaled by {scales}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("class")
    table.add_column("IoU", justify="right")
    for name, iou in zip(data.names, ious, strict=True):
        table.add_row(name, "-" if iou is None else f"{iou:.4f}")
    table.add_section()
    table.add_row("mean", f"{mean:.4f}")
    console.print(table)
    if here.first:
        write_whole(args.out / "iou.csv", ("class", "iou"), [*zip(data.names, ious, strict=True), ("mean", mean)])
    console.print(f"Wrote {args.out / 'iou.csv'}", highlight=False)
