"""Tasks small enough to learn on a CPU that need long-range context, generated as they are drawn.

A task draws images and, for every pixel, its class or `IGNORED`. A backbone of two 3x3 convolutions sees two pixels
far; whatever decides about a pixel lies farther away.

`keys`: grey rectangles on noise and, somewhere, one pixel of a colour, the key. The class of a rectangle's pixels is
the key's colour. It is known where the evidence lies, so also what a head can reach of it.

`mosaics`: scikit-learn's handwritten digits side by side, all of one class in many hands, every other pixel lost. The
class of a stroke's pixels is the digit: one patch hardly tells it, the whole mosaic does. Training and test have
digits of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor

SIZE = (24, 32)  # of the images and of every map
IGNORED = -1  # the class of pixels that are not judged
COLOURS = torch.eye(3)  # red, green and blue


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
