"""Tasks small enough to learn on a CPU that need long-range context, networks, and which of these learn which task.

A task draws images and, for every pixel, its class or `IGNORED`. A backbone of two 3x3 convolutions sees two pixels
far; whatever decides about a pixel lies farther away.

`keys`: grey rectangles on noise and, somewhere, one pixel of a colour, the key. The class of a rectangle's pixels is
the key's colour. It is known where the evidence lies, so also what a head can reach of it.

`mosaics`: scikit-learn's handwritten digits side by side, all of one class in many hands, every other pixel lost. The
class of a stroke's pixels is the digit: one patch hardly tells it, the whole mosaic does. Training and test have
digits of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import reference
from bench.compared import modules
from isa_triton import ISAModule, SelfAttention2d
from isa_triton.models.block import ISABlock
from reference.attention import Groups

SIZE = (24, 32)  # of the images and of every map
IGNORED = -1  # the class of pixels that are not judged
COLOURS = torch.eye(3)  # red, green and blue
RECEPTIVE_FIELD = 5  # pixels across, of two 3x3 convolutions
CHANNELS, KEY_CHANNELS = 32, 16  # of maps and values, and of keys

# -- tasks -------------------------------------------------------------------------------------------------------------


class Drawn(NamedTuple):
    """Images [count, C, H, W], the classes of their pixels [count, H, W], and where the evidence lies, if known."""

    images: Tensor
    classes: Tensor
    evidence: Tensor | None = None


class Task(NamedTuple):
    """A source of images: ``draw(count, generator, unseen)``, where `unseen` asks for what no training sees."""

    channels: int
    classes: int
    draw: Callable[[int, Generator, bool], Drawn]


def keys(count: int, generator: Generator, unseen: bool = False) -> Drawn:
    """Rectangles whose class is the colour of a distant key; every draw is new, for training and for test."""
    H, W = SIZE
    images = 0.3 * torch.rand(count, 3, H, W, generator=generator)
    classes = torch.full((count, H, W), IGNORED)
    evidence = torch.zeros(count, H, W, dtype=torch.bool)
    for image, class_, key in zip(images, classes, evidence, strict=True):
        colour = _uniform(0, len(COLOURS), generator)
        for _ in range(4):
            h, w = _uniform(3, 9, generator), _uniform(3, 9, generator)
            top, left = _uniform(0, H - h + 1, generator), _uniform(0, W - w + 1, generator)
            image[:, top : top + h, left : left + w] = 1
            class_[top : top + h, left : left + w] = colour
        y, x = _uniform(0, H, generator), _uniform(0, W, generator)
        image[:, y, x] = 2 * COLOURS[colour]
        class_[y, x], key[y, x] = IGNORED, True
    return Drawn(_noisy(images, generator), classes, evidence)


def mosaics(count: int, generator: Generator, unseen: bool = False) -> Drawn:
    """Mosaics of one digit in many hands; cut so that digits and windows do not coincide.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
    """
    digits = _digits(unseen)
    H, W = SIZE
    side = digits[0].shape[-1]
    rows, columns = H // side + 1, W // side + 1
    images, classes = torch.zeros(count, 1, H, W), torch.full((count, H, W), IGNORED)
    for image, class_ in zip(images, classes, strict=True):
        digit = _uniform(0, len(digits), generator)
        hands = torch.randint(len(digits[digit]), (rows, columns), generator=generator)
        sheet = digits[digit][hands].transpose(1, 2).reshape(rows * side, columns * side)  # [rows, side, columns, side]
        top, left = _uniform(0, side, generator), _uniform(0, side, generator)
        cut = sheet[top : top + H, left : left + W]
        class_[cut >= 0.25] = digit
        image[0] = cut * (torch.rand(H, W, generator=generator) < 0.5)
    return Drawn(_noisy(images, generator), classes)


KEYS, MOSAICS = Task(3, len(COLOURS), keys), Task(1, 10, mosaics)


@cache
def _digits(unseen: bool) -> list[Tensor]:
    """The images [n, 8, 8] of each digit, from 0 to 1: two thirds of the data set, or the rest."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, classes = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(images), generator=Generator().manual_seed(0))  # whatever its own order
    chosen = order[2 * len(order) // 3 :] if unseen else order[: 2 * len(order) // 3]
    return [images[chosen[classes[chosen] == digit]] for digit in range(10)]


def _uniform(low: int, high: int, generator: Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator))


def _noisy(images: Tensor, generator: Generator) -> Tensor:
    return images + 0.05 * torch.randn(images.shape, generator=generator)


# -- what a head connects ----------------------------------------------------------------------------------------------

Stage = Callable[[Tensor], Tensor]  # from where something is known, [B, H, W], to where it is after one attention


def within(groups: Groups, partition_size: tuple[int, int], known: Tensor) -> Tensor:
    """What one pixel of a group knows, all do."""
    known = known.clone()
    for rows, columns in groups(SIZE, partition_size):
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
    pairs = [(p, p) for p in sizes]
    return ISAModule(CHANNELS, KEY_CHANNELS, CHANNELS, CHANNELS, partition_size=pairs, dropout=0.0, order=order)


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
    layers = *backbone(task), HEADS[head].build(), reference.ConvNormReLU(CHANNELS, CHANNELS)
    return nn.Sequential(*layers, nn.Conv2d(CHANNELS, task.classes, 1))


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
    """A plot: what is asked, of which experiment, whose accuracies answer it, and who is shown, None: all."""

    title: str
    experiment: str
    answers: tuple[str, ...]
    networks: tuple[str, ...] | None = None


_SEGMENTERS = {name: partial(segmenter, name) for name in HEADS}
_CLASSIFIERS = {name: partial(classifier, n) for name, n in (("no block", 0), ("1 block", 1), ("3 blocks", 3))}
_FEW = ("none", "dense", "ISA", "long", "short")

EXPERIMENTS = {
    "keys": Experiment(KEYS, _SEGMENTERS, _FEW, steps=400),
    "mosaics": Experiment(MOSAICS, {name: _SEGMENTERS[name] for name in _FEW}, ("none", "ISA"), steps=200),
    "blocks": Experiment(MOSAICS, _CLASSIFIERS, ("no block", "1 block"), steps=200, of_images=True),
}
_COMPARED = ("none", "dense", "NL", "SA", "RCCA", "CGNL", "ISA")
_STAGES = ("none", "dense", "long", "long twice", "short", "short twice", "short-long", "ISA")
QUESTIONS = {
    "heads": Question("Keys: does ISA learn what dense attention does?", "keys", ("dense", "ISA"), _COMPARED),
    "stages": Question(
        "Keys: is one stage enough, once or twice?", "keys", ("long twice", "short twice", "ISA"), _STAGES
    ),
    "mosaics": Question("Mosaics: does context tell the class of a stroke?", "mosaics", ("none", "dense", "ISA")),
    "blocks": Question("Mosaics: do ISA blocks help a classifier?", "blocks", ("no block", "1 block", "3 blocks")),
}
