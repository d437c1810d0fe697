"""Heads and how far what one pixel knows gets in them, networks with them, and which of these learn which task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import reference
from bench.accuracy.tasks import IGNORED, KEYS, MOSAICS, SIZE, Task
from bench.compared import modules
from isa_triton import ISAModule, SelfAttention2d
from isa_triton.models.block import ISABlock
from reference.attention import Groups

RECEPTIVE_FIELD = 5  # pixels across, of two 3x3 convolutions
CHANNELS, KEY_CHANNELS = 32, 16  # of maps and values, and of keys

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


dense: Stage = partial(within, reference.short_range_groups, SIZE)


def criss_cross(known: Tensor) -> Tensor:
    row, column = (1, SIZE[1]), (SIZE[0], 1)
    return within(reference.short_range_groups, row, known) | within(reference.short_range_groups, column, known)


def share_reached(stages: Sequence[Stage], classes: Tensor, evidence: Tensor) -> float:
    """The share of the labelled pixels that the evidence reaches through the backbone and these stages."""
    known = F.max_pool2d(evidence.float().unsqueeze(1), RECEPTIVE_FIELD, 1, RECEPTIVE_FIELD // 2).squeeze(1).bool()
    for stage in stages:
        known = stage(known)
    return float(known[classes != IGNORED].float().mean())


# -- heads -------------------------------------------------------------------------------------------------------------


class AttentionModule(nn.Module):
    """The ISA module with any attention in it: beside its input, joined by conv1x1 + BN + ReLU."""

    def __init__(self, *patterns: str) -> None:
        super().__init__()
        stages = (SelfAttention2d(CHANNELS, KEY_CHANNELS, CHANNELS, pattern=q, partition_size=(8, 8)) for q in patterns)
        self.stages, self.join = nn.Sequential(*stages), reference.ConvNormReLU(2 * CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat([x, self.stages(x)], 1))


def isa(*sizes: int, order: str = "long-short") -> ISAModule:
    """The ISA module with these partition sizes."""
    partition_size = [(p, p) for p in sizes]
    return ISAModule(
        CHANNELS, KEY_CHANNELS, CHANNELS, CHANNELS, partition_size=partition_size, dropout=0.0, order=order
    )


@dataclass(frozen=True)
class Head:
    """A module between maps of `CHANNELS`, and the stages by which it passes on what a pixel knows."""

    build: Callable[[], nn.Module]
    stages: Sequence[Stage]


HEADS = {
    "none": Head(nn.Identity, ()),
    "NL": Head(partial(modules.PartitionedNonLocal, CHANNELS), (dense,)),
    "SA": Head(partial(modules.SdpaSA, CHANNELS, KEY_CHANNELS, CHANNELS, CHANNELS, dropout=0.0), (dense,)),
    "RCCA": Head(partial(modules.PartitionedRCCA, CHANNELS), (criss_cross, criss_cross)),
    "CGNL": Head(partial(reference.CGNL, CHANNELS), (dense,)),
    "dense": Head(partial(AttentionModule, "dense"), (dense,)),
    "ISA": Head(partial(isa, 8), (long_range(8), short_range(8))),
    "short-long": Head(partial(isa, 8, order="short-long"), (short_range(8), long_range(8))),
    "long": Head(partial(AttentionModule, "interlaced"), (long_range(8),)),
    "short": Head(partial(AttentionModule, "local"), (short_range(8),)),
    "long twice": Head(partial(AttentionModule, "interlaced", "interlaced"), (long_range(8),)),
    "short twice": Head(partial(AttentionModule, "local", "local"), (short_range(8),)),
    "ISA P=2": Head(partial(isa, 2), (long_range(2), short_range(2))),
    "ISA P=4": Head(partial(isa, 4), (long_range(4), short_range(4))),
    "ISA P=4, 8": Head(partial(isa, 4, 8), (long_range(8), short_range(8))),
}

# -- networks ----------------------------------------------------------------------------------------------------------


def backbone(task: Task) -> tuple[nn.Module, nn.Module]:
    return reference.ConvNormReLU(task.channels, CHANNELS, 3), reference.ConvNormReLU(CHANNELS, CHANNELS, 3)


def segmenter(head: str, task: Task) -> nn.Module:
    """The backbone, a head, and a classifier of pixels: [B, C, H, W] -> [B, classes, H, W]."""
    return nn.Sequential(
        *backbone(task),
        HEADS[head].build(),
        reference.ConvNormReLU(CHANNELS, CHANNELS),
        nn.Conv2d(CHANNELS, task.classes, 1),
    )


def classifier(blocks: int, task: Task) -> nn.Module:
    """The backbone, three 1x1 convolutions, ISA blocks (residual) behind the first `blocks` of them, and a classifier
    of images: [B, C, H, W] -> [B, classes].
    """
    layers: list[nn.Module] = []
    for place in range(3):
        layers.append(reference.ConvNormReLU(CHANNELS, CHANNELS))
        if place < blocks:
            layers.append(ISABlock(CHANNELS, KEY_CHANNELS, CHANNELS))
    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, task.classes)
    return nn.Sequential(*backbone(task), *layers, *pooled)


# -- what is asked -----------------------------------------------------------------------------------------------------


class Experiment(NamedTuple):
    """Networks that learn one task, for so many steps unless told otherwise; those of `quick` for a first look."""

    task: Task
    networks: Mapping[str, Callable[[Task], nn.Module]]
    quick: tuple[str, ...]
    steps: int
    of_images: bool = False  # one class an image in place of one a pixel


class Question(NamedTuple):
    """A plot: its title, the experiment that answers it, and the networks that it shows, None: all."""

    title: str
    experiment: str
    networks: tuple[str, ...] | None = None


_SEGMENTERS = {name: partial(segmenter, name) for name in HEADS}
_CLASSIFIERS = {name: partial(classifier, n) for name, n in (("no block", 0), ("1 block", 1), ("3 blocks", 3))}
_FEW = ("none", "dense", "ISA", "long", "short")

EXPERIMENTS = {
    "keys": Experiment(KEYS, _SEGMENTERS, _FEW, steps=400),
    "mosaics": Experiment(MOSAICS, {name: _SEGMENTERS[name] for name in _FEW}, ("none", "ISA"), steps=200),
    "blocks": Experiment(MOSAICS, _CLASSIFIERS, ("no block", "1 block"), steps=200, of_images=True),
}
QUESTIONS = {
    "heads": Question(
        "Keys: ISA against what it is compared with", "keys", ("none", "NL", "SA", "RCCA", "CGNL", "dense", "ISA")
    ),
    "stages": Question(
        "Keys: the order of the stages, and one alone (twice: with the parameters of both)",
        "keys",
        ("none", "ISA", "short-long", "long", "long twice", "short", "short twice", "dense"),
    ),
    "partition_sizes": Question("Keys: the partition size", "keys", ("ISA P=2", "ISA P=4", "ISA", "ISA P=4, 8")),
    "mosaics": Question("Mosaics of digits: the class of a stroke", "mosaics"),
    "blocks": Question("Mosaics of digits: ISA blocks in a classifier", "blocks"),
}
