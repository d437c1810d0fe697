"""What is trained and how: with the data it says everything about a run, down to the last bit of randomness."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from bench.train.classes import Classes

IGNORED = 255  # the class of pixels that no loss and no score counts

_COLUMNS = ("crop", "batch", "lr", "weight_decay", "iterations", "output_stride")
_ROWS: dict[str, tuple[Any, ...]] = {
    # the authors', arXiv 1907.12273
    "cityscapes": ((512, 1024), 8, 0.01, 5e-4, 40_000, 8),
    "ade20k": ((520, 520), 16, 0.02, 1e-4, 150_000, 8),
    "lip": ((473, 473), 32, 0.007, 5e-4, 110_000, 16),
    # ours, after the schedules that are usual for these
    "voc": ((512, 512), 16, 0.01, 5e-4, 40_000, 8),
    "coco": ((512, 512), 16, 0.01, 1e-4, 80_000, 8),
    "folder": ((512, 512), 8, 0.01, 5e-4, 20_000, 8),  # of one's own
}
RECIPES = {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _ROWS.items()}  # by data set


class InputError(argparse.ArgumentError):
    """What the user gave cannot be used; the message says what would be valid.

    Args:
        message: a line.
        path: of the file that it is about, which the message names first.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(None, message.rpartition("InputError: ")[2])  # a data loader puts its traceback before it
        self.path = path


@dataclass(frozen=True)
class Recipe:
    """One run: the authors' recipe (SGD, poly learning rate, auxiliary loss, scale jitter, crop, flip) in numbers.

    Everything random is a function of `seed` and of the number of an iteration or sample, so that an interrupted run
    goes on as if it had not been.
    """

    data_set: str
    classes: Classes
    head: str  # a segmentation head by its name in `bench.compared.heads`
    backbone: str
    channels: int  # of the head
    partition_size: tuple[int, int]
    crop: tuple[int, int]
    batch: int  # of all processes together
    lr: float
    weight_decay: float
    iterations: int
    output_stride: int
    weights: str | None = None  # the backbone's first, by torchvision's name
    dtype: str = "float32"  # of autocast
    seed: int = 0
    momentum: float = 0.9
    power: float = 0.9
    auxiliary: float = 0.4
    jitter: tuple[float, float] = (0.5, 2.0)

    def learning_rate(self, iteration: int) -> float:
        """The poly schedule, lr (1 - iteration / iterations)^power."""
        return self.lr * (1 - iteration / self.iterations) ** self.power

    def autocast(self, device: torch.device) -> torch.autocast:
        """Mixed precision on a device."""
        half = self.dtype != "float32"
        return torch.autocast(device.type, getattr(torch, self.dtype) if half else None, enabled=half)

    def loss(self, logits: dict[str, Tensor], labels: Tensor) -> Tensor:
        """Cross-entropy of "out", and `auxiliary` times that of "aux": [B, classes, H, W] each; labels [B, H, W]."""
        loss = cross_entropy(logits["out"], labels)
        return loss + self.auxiliary * cross_entropy(logits["aux"], labels) if "aux" in logits else loss


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over pixels that have a class, in fp32; 0 where none has."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / (labels != IGNORED).sum().clamp(min=1)


class Stream(IntEnum):
    """What chance decides, each from random numbers of its own."""

    ORDER = 0  # of the samples of an epoch
    AUGMENTATION = 1  # of a sample
    DROPOUT = 2  # of a process in an iteration


def seed_of(seed: int, what: Stream, *numbers: int) -> int:
    """A seed for a generator that is a function of all of these, and of nothing else."""
    return int(np.random.SeedSequence((seed, what, *numbers)).generate_state(1, np.uint64)[0])
