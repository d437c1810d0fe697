"""A run: the network of a recipe, its optimiser, one iteration after another, and checkpoints between them."""

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

from bench import heads
from bench.records import replacing
from bench.training import InputError
from bench.training.recipe import Recipe, Stream, seed_of
from isa_triton.models.ianet import IANet, ianet
from isa_triton.sharding import ShardedBatchNorm2d


@dataclass(frozen=True)
class Processes:
    """This process among those that train one network."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: Tensor) -> list[float]:
        """Sums of scalars over all processes."""
        total = torch.stack([value.to(self.device, torch.float64) for value in values])
        if self.count > 1:
            dist.all_reduce(total)
        return total.tolist()


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Joins the processes that torchrun has started, or is alone; every one takes a GPU of its own."""
    if "RANK" not in os.environ:
        yield Processes(torch.device(device))
        return
    here = torch.device(device)
    if here.type == "cuda":
        here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(here)
    dist.init_process_group("nccl" if here.type == "cuda" else "gloo")
    try:
        yield Processes(here, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def network(recipe: Recipe, num_classes: int, weights: str | None = None) -> IANet:
    """IANet with the recipe's head; the backbone starts with `weights` of torchvision, or random ones.

    Raises:
        InputError: torchvision has no such network or weights, or cannot get them.
    """
    head = heads.head(recipe.head, 2048, recipe.channels, num_classes, recipe.partition_size)
    try:
        return ianet(num_classes, name=recipe.backbone, head=head, output_stride=recipe.output_stride, weights=weights)
    except (ValueError, KeyError, OSError) as error:
        without = "; --weights none starts from random ones" if weights else ""
        raise InputError(f"--backbone {recipe.backbone} --weights {weights}: {error}{without}") from error


def synchronised(module: nn.Module, device: torch.device) -> nn.Module:
    """A network whose batch statistics are those of all processes; torch's own layer refuses CPU tensors."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for norm in module.modules():
        if type(norm) is nn.BatchNorm2d:
            norm.__class__ = ShardedBatchNorm2d
            norm.mesh = mesh  # type: ignore[assignment]
    return module


class Run:
    """A network in training, at `iteration` of its recipe.

    Args:
        recipe: what is trained and how.
        num_classes: of the data.
        here: this process; all of them hold the same network.
        checkpoint: of the same recipe, to go on where it was written.
    """

    def __init__(
        self, recipe: Recipe, num_classes: int, here: Processes, checkpoint: dict[str, Any] | None = None
    ) -> None:
        self.recipe, self.here, self.iteration = recipe, here, 0
        torch.manual_seed(recipe.seed)
        weights = None if checkpoint else recipe.weights
        self.network: nn.Module = network(recipe, num_classes, weights).to(here.device)
        self.model: nn.Module = self.network
        if here.count > 1:
            self.network = synchronised(self.network, here.device)
            self.model = DistributedDataParallel(self.network)
        self.optimiser = torch.optim.SGD(
            self.network.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.scaler = torch.amp.GradScaler(here.device.type, enabled=recipe.precision == "float16")
        if checkpoint:
            self.network.load_state_dict(checkpoint["network"])
            self.optimiser.load_state_dict(checkpoint["optimiser"])
            self.scaler.load_state_dict(checkpoint["scaler"])
            self.iteration = checkpoint["iteration"]

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One iteration on this process's images [B, 3, H, W] and labels [B, H, W]; its loss."""
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.learning_rate(self.iteration)
        torch.manual_seed(seed_of(self.recipe.seed, Stream.DROPOUT, self.iteration, self.here.rank))
        images, labels = (x.to(self.here.device, non_blocking=True) for x in (images, labels))
        self.model.train()
        with autocast(self.recipe, self.here.device):
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
        checkpoint = {
            "recipe": asdict(self.recipe),
            "iteration": self.iteration,
            "network": self.network.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)


def autocast(recipe: Recipe, device: torch.device) -> torch.autocast:
    """Mixed precision as the recipe has it."""
    half = recipe.precision != "float32"
    return torch.autocast(device.type, getattr(torch, recipe.precision) if half else None, enabled=half)


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """What `Run.save` wrote, its recipe as a `Recipe`.

    Raises:
        InputError: the file is missing or something else.
    """
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        return checkpoint | {"recipe": Recipe(**checkpoint["recipe"])}
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(f"{path} must be a checkpoint that this command wrote") from error
