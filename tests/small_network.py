"""A network of two convolutions in place of a ResNet, and a recipe to train it by.

``python -m tests.small_network`` is ``python -m bench`` with this network, for processes that are killed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bench.__main__ import main
from bench.train import trainer
from bench.train.data import DATA_SETS
from bench.train.recipe import RECIPES, Recipe
from isa_triton import ISAHead
from isa_triton.models.ianet import IANet, fcn_head


class Pyramid(nn.Module):
    """A backbone of two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 12, 3, 2, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.stages[0](x)
        return [y, self.stages[1](y)]


def small(num_classes: int, *, dropout: float = 0.1, **_: Any) -> IANet:
    """In place of `ianet`, whatever head it is given."""
    head = ISAHead(12, 8, num_classes, key_channels=4, partition_size=(2, 3), dropout=dropout)
    return IANet(Pyramid(), head, fcn_head(8, 4, num_classes, dropout=dropout))


def recipe(**changes: Any) -> Recipe:
    mine = {
        "head": "ISA",
        "backbone": "resnet50",
        "crop": (32, 64),
        "batch": 2,
        "iterations": 5,
        "channels": 16,
        "partition_size": (2, 2),
    }
    name = changes.pop("data_set", "cityscapes")
    return Recipe(data_set=name, **RECIPES[name] | {"classes": DATA_SETS[name].classes} | mine | changes)


if __name__ == "__main__":
    trainer.ianet = small
    main()
