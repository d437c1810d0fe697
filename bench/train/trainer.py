"""Runs of a recipe, in one process or several.

Training from the data on to log.csv, checkpoint.pt and network.pt, until it is done or a signal comes; evaluation to
iou.csv.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from bench import records
from bench.compared import heads
from bench.terminal import Table, Terminal
from bench.train.checking import check
from bench.train.data import RandomSamples, Samples, batches, data_set
from bench.train.evaluation import intersection_over_union, probabilities
from bench.train.peers import joined
from bench.train.recipe import InputError, Recipe, Stream, seed_of
from bench.train.saved import read_checkpoint, restore, write_checkpoint
from isa_triton.models.ianet import IANet, ianet
from isa_triton.norm import BatchNorm2d
from isa_triton.sharding import ShardedBatchNorm2d

T = TypeVar("T")
SPOKEN = 100  # iterations to a line for who watches

# -- a process, a network ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """This process among those that train one network."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    def sum(self, *values: Tensor) -> list[float]:
        """Sums of scalars over all processes."""
        total = torch.stack([value.to(self.device, torch.float64) for value in values])
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in everyone's hands."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def join(device: str) -> Iterator[Process]:
    """Join the processes that torchrun has started, or be alone; every one takes a GPU of its own."""
    here = torch.device(device)
    if "RANK" not in os.environ:
        yield Process(here)
        return
    if here.type == "cuda":
        here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(here)
    with joined("nccl" if here.type == "cuda" else "gloo") as (rank, world_size):
        yield Process(here, rank, world_size)


def build(recipe: Recipe, weights: str | None = None) -> IANet:
    """IANet with the recipe's head, for its classes; the backbone starts with `weights` of torchvision or random ones.

    Raises:
        InputError: torchvision has no such network or weights, or cannot get them.
    """
    num_classes = len(recipe.classes)
    head = heads.head(recipe.head, 2048, recipe.channels, num_classes, recipe.partition_size)
    try:
        return ianet(num_classes, name=recipe.backbone, head=head, output_stride=recipe.output_stride, weights=weights)
    except (ValueError, KeyError, OSError) as error:
        without = "; --weights none starts from random ones" if weights else ""
        why = f"torchvision has no weights of this name for it: {known(recipe.backbone)}"
        why = why if isinstance(error, KeyError) else str(error)
        raise InputError(f"--backbone {recipe.backbone} --weights {weights}: {why}{without}") from error


def known(backbone: str) -> str:
    """The names of torchvision's weights of a backbone."""
    from torchvision.models import get_model_weights

    return ", ".join(weights.name for weights in get_model_weights(backbone))


def synchronise_batch_norm(network: nn.Module, device: torch.device) -> nn.Module:
    """A network whose batch statistics are those of all processes; torch's own layer refuses CPU tensors."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for norm in network.modules():
        if type(norm) in (BatchNorm2d, nn.BatchNorm2d):
            norm.__class__ = ShardedBatchNorm2d
            norm.mesh = mesh  # type: ignore[assignment]
    return network


class Trainer:
    """A network in training, at `iteration` of its recipe.

    Args:
        recipe: what is trained and how.
        process: this one; all of them hold the same network.
        checkpoint: of the same recipe, to go on where it was written.
    """

    def __init__(self, recipe: Recipe, process: Process, checkpoint: dict[str, Any] | None = None) -> None:
        self.recipe, self.process, self.iteration = recipe, process, 0
        torch.manual_seed(recipe.seed)
        self.network: nn.Module = build(recipe, None if checkpoint else recipe.weights).to(process.device)
        self.model: nn.Module = self.network
        if process.world_size > 1:
            self.network = synchronise_batch_norm(self.network, process.device)
            self.model = DistributedDataParallel(self.network)
        parameters = self.network.parameters()
        self.optimiser = torch.optim.SGD(parameters, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=recipe.dtype == "float16")
        if checkpoint:
            for name, part in self._parts().items():
                restore(part, checkpoint, name)
            self.iteration = checkpoint["iteration"]

    def _parts(self) -> dict[str, Any]:
        return {"network": self.network, "optimiser": self.optimiser, "scaler": self.scaler}

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One iteration on this process's images [B, 3, H, W] and labels [B, H, W]; its loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.learning_rate(self.iteration)
        torch.manual_seed(seed_of(self.recipe.seed, Stream.DROPOUT, self.iteration, self.process.rank))
        images, labels = (x.to(self.process.device, non_blocking=True) for x in (images, labels))
        self.model.train()
        with self.recipe.autocast(self.process.device):
            logits = self.model(images)
        loss = self.recipe.loss(logits, labels)
        self.optimiser.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.iteration += 1
        return loss.detach()

    def save(self, path: Path, *names: str) -> None:
        """Write parts, by default everything that the next iteration depends on, whole or not at all."""
        parts = self._parts()
        states = {name: parts[name].state_dict() for name in names or parts}
        write_checkpoint(path, self.recipe, self.iteration, states)


# -- a run -------------------------------------------------------------------------------------------------------------


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


def train(recipe: Recipe, args: argparse.Namespace, process: Process, said: Terminal) -> Trainer:
    """Train until the recipe is fulfilled or a signal comes, from the checkpoint in --out on if there is one."""
    data = data_set(recipe)
    if data.own:  # nobody else has checked it
        paths = check(data, args.data, process, said)["train"]
    else:
        paths = data.paths(args.data, "train")
        data.paths(args.data, "val")  # missing ones are better noticed before training than after
    log, checkpoint, network = (args.out / name for name in ("log.csv", "checkpoint.pt", "network.pt"))
    saved = read_checkpoint(checkpoint, process.device) if checkpoint.exists() else None
    if saved and saved["recipe"] != recipe:
        pairs = zip(*(vars(one).items() for one in (saved["recipe"], recipe)), strict=True)
        unlike = ", ".join(f"with {name} {old}, not {new}" for (name, old), (_, new) in pairs if old != new)
        raise InputError(f"{checkpoint} was trained {unlike}: give another --out")
    trainer = Trainer(recipe, process, saved)
    try:
        rows = [row for row in records.read(log, Iteration) if row.iteration <= trainer.iteration]
    except ValueError as error:
        raise InputError(str(error)) from error
    loader = DataLoader(
        RandomSamples(data, paths, recipe),
        batch_sampler=batches(trainer.iteration, recipe, process.rank, process.world_size),
        num_workers=args.workers,
        pin_memory=process.device.type == "cuda",
        worker_init_fn=leave_process_group,
    )
    stopping, first = False, trainer.iteration + 1
    bars, drawn = said.progress("iterations", recipe.iterations - trainer.iteration), events(args.out, process, first)
    with stop_signals() as asked, bars as bar, drawn as draw:
        said.say(
            f"{recipe.head} on {recipe.backbone}, {recipe.data_set} with {len(paths)} images: {recipe.iterations}"
            f" iterations of {recipe.batch} crops of {records.format_size(recipe.crop)}, learning rate {recipe.lr},"
            f" weight decay {recipe.weight_decay}, to {args.out}"
            + (f"; goes on after iteration {trainer.iteration}" if saved else "")
        )
        begin = time.perf_counter()
        for images, labels in loader:
            loss = trainer.step(images, labels)
            total, stopped = process.sum(loss, torch.tensor(asked.is_set()))
            mean, end, stopping = total / process.world_size, time.perf_counter(), stopped > 0
            if not math.isfinite(mean):
                raise InputError(f"the loss became {mean} in iteration {trainer.iteration}: try a lower --lr")
            rate = recipe.learning_rate(trainer.iteration - 1)
            rows.append(Iteration(trainer.iteration, rate, mean, round(end - begin, 4)))
            draw(rows[-1])
            bar.now(f"loss {mean:.4f}")
            bar.advance()
            begin = end
            done = stopping or trainer.iteration == recipe.iterations
            if done or trainer.iteration % SPOKEN == 0:
                said.say(spoken(rows[-SPOKEN:], recipe))
            if process.rank == 0 and (done or trainer.iteration % args.save_every == 0):
                records.write(log, Iteration, rows)  # first: a run that goes on drops what the checkpoint does not know
                trainer.save(checkpoint)
            if stopping:
                break
    if process.rank == 0:
        trainer.save(network, "network")
        how = f"Stopped after iteration {trainer.iteration}; the same command goes on" if stopping else "Trained"
        sizes = (f"{path.name} {path.stat().st_size / 1e6:.0f} MB" for path in (checkpoint, network))
        said.end(f"{how}: {', '.join(sizes)}.", log, checkpoint, network)
    return trainer


def spoken(rows: Sequence[Iteration], recipe: Recipe) -> str:
    """The last iterations, for who watches: their mean loss, how fast they were, and how long the rest will take."""
    last, seconds = rows[-1], statistics.mean(row.seconds for row in rows)
    left = timedelta(seconds=round(seconds * (recipe.iterations - last.iteration)))
    loss = statistics.mean(row.loss for row in rows)
    return (
        f"iteration {last.iteration}/{recipe.iterations}: loss {loss:.4f}, learning rate {last.learning_rate:.3g},"
        f" {recipe.batch / max(seconds, 1e-9):.3g} images/s, {left} left"
    )


@contextmanager
def events(folder: Path, process: Process, first: int) -> Iterator[Callable[[Iteration], None]]:
    """Draws iterations from `first` on for TensorBoard, in the first process and where it is installed."""
    if process.rank or not find_spec("tensorboard"):
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder), purge_step=first) as writer:

        def draw(row: Iteration) -> None:
            writer.add_scalar("loss", row.loss, row.iteration)
            writer.add_scalar("learning rate", row.learning_rate, row.iteration)

        yield draw


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set, the first time; the second time they do what they always did."""
    asked = threading.Event()

    def handle(number: int, frame: Any) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:  # a signal may come at once
        signal.signal(number, handle)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_process_group(worker: int) -> None:
    """What Ctrl-C and torchrun send to the whole group is no business of a process that loads images."""
    if os.name == "posix":
        os.setpgrp()


def evaluate(network: nn.Module, recipe: Recipe, args: argparse.Namespace, process: Process, said: Terminal) -> None:
    """Mean IoU over the validation images, printed and written to iou.csv."""
    data = data_set(recipe)
    images = Samples(data, data.paths(args.data, "val"))
    mine = Subset(images, range(process.rank, len(images), process.world_size))
    loader = DataLoader(mine, batch_size=None, num_workers=args.workers, worker_init_fn=leave_process_group)
    mirror = data.classes.mirror[: len(data.classes)].to(process.device) if args.flip else None
    network.eval()

    def predicted() -> Iterator[tuple[Tensor, Tensor]]:
        for image, label in loader:
            x = image.unsqueeze(0).to(process.device)
            y = probabilities(lambda x: network(x)["out"], x, recipe.crop, args.scales, mirror)
            yield y[0].argmax(0), label.to(process.device)
            bar.advance()

    with torch.inference_mode(), recipe.autocast(process.device), said.progress("images", len(mine)) as bar:
        ious, mean = intersection_over_union(predicted(), len(data.classes), process.device)
    scales = " ".join(f"{scale:g}" for scale in args.scales) + (", flipped and not" if args.flip else "")
    title = f"IoU of {len(images)} images in windows of {records.format_size(recipe.crop)}, scaled by {scales}"
    rows = [*map(IoU, data.classes.names, ious), IoU("mean", mean)]
    lines = [(row.class_, None if row.iou is None else f"{row.iou:.4f}") for row in rows]
    said.show(Table(title, ("class", "IoU"), [*lines[:-1], (), lines[-1]]))
    path = args.out / "iou.csv"
    if process.rank == 0:
        records.write(path, IoU, rows)
    said.end(f"Mean IoU {mean:.4f}.", path)
