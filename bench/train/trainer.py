"""The network of a recipe with its optimiser, in one process or several: one step after another, and checkpoints."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from bench.compared import heads
from bench.records import replacing
from bench.train.data import DATA_SETS
from bench.train.recipe import InputError, Recipe, Stream, seed_of
from isa_triton.models.ianet import IANet, ianet
from isa_triton.sharding import ShardedBatchNorm2d


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
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    try:
        yield Process(here, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def build(recipe: Recipe, weights: str | None = None) -> IANet:
    """IANet with the recipe's head, for its data set; the backbone starts with `weights` of torchvision or random ones.

    Raises:
        InputError: torchvision has no such network or weights, or cannot get them.
    """
    num_classes = len(DATA_SETS[recipe.data_set].ids)
    head = heads.head(recipe.head, 2048, recipe.channels, num_classes, recipe.partition_size)
    try:
        return ianet(num_classes, name=recipe.backbone, head=head, output_stride=recipe.output_stride, weights=weights)
    except (ValueError, KeyError, OSError) as error:
        without = "; --weights none starts from random ones" if weights else ""
        raise InputError(f"--backbone {recipe.backbone} --weights {weights}: {error}{without}") from error


def synchronise_batch_norm(network: nn.Module, device: torch.device) -> nn.Module:
    """A network whose batch statistics are those of all processes; torch's own layer refuses CPU tensors."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for norm in network.modules():
        if type(norm) is nn.BatchNorm2d:
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
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=recipe.precision == "float16")
        if checkpoint:
            for name, part in self._parts().items():
                part.load_state_dict(checkpoint[name])
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

    def save(self, path: Path) -> None:
        """Write everything that the next iteration depends on, whole or not at all."""
        states = {name: part.state_dict() for name, part in self._parts().items()}
        with replacing(path) as temporary:
            torch.save({"recipe": asdict(self.recipe), "iteration": self.iteration} | states, temporary)


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """What `Trainer.save` wrote, its recipe as a `Recipe`.

    Raises:
        InputError: the file is missing or something else.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        return checkpoint | {"recipe": Recipe(**checkpoint["recipe"])}
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} must be a checkpoint that this command wrote") from error
