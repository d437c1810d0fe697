"""Labels for images of any size by a trained network: overlapping tiles, whose size a bound of memory decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

from bench import measure
from bench.records import format_size
from bench.train.data import coloured, normalised_image, read, upright
from bench.train.evaluation import strips, window_starts
from bench.train.recipe import InputError, Recipe
from bench.train.saved import restore
from bench.train.trainer import build

SMALLEST = 64  # pixels: a tile's side is not halved below
A_PIXEL = 10  # bytes of an image's pixel at most: decoded, turned, as a tensor; then as labels and their file


class Predictor:
    """A network, and what it may take.

    Args:
        checkpoint: what `read_checkpoint` gives.
        device: of the network.
        tile: (h, w) of what it sees at once, if memory allows; None: what it was trained on, as evaluation does.
        limit: bytes of weights, activations, image and results together.
    """

    def __init__(
        self, checkpoint: dict[str, Any], device: torch.device, tile: tuple[int, int] | None, limit: float
    ) -> None:
        self.recipe: Recipe = checkpoint["recipe"]
        self.device, self.largest, self.limit = device, tile or self.recipe.crop, limit
        self.network: nn.Module = build(self.recipe).to(device).eval()
        restore(self.network, checkpoint, "network", assign=True)  # weights are there once
        self._counted: dict[tuple[int, int], int] = {}

    def tile(self, path: Path, size: tuple[int, int]) -> tuple[int, int]:
        """The tile for an image of (height, width): the largest, halved until everything fits.

        Raises:
            InputError: the smallest does not fit.
        """
        tile = self.largest
        while (needed := self.bytes_needed(tile, size)) > self.limit:
            smaller = _halved(tile[0]), _halved(tile[1])
            if smaller == tile:
                raise InputError(
                    f"{path} has {format_size(size)} pixels, which need {needed / 1e9:.2g} GB in tiles of"
                    f" {format_size(tile)}: --memory-limit must be as much, got {self.limit / 1e9:g}",
                    path,
                )
            tile = smaller
        return tile

    def bytes_needed(self, tile: tuple[int, int], size: tuple[int, int]) -> int:
        """The most bytes alive at once for an image of (height, width).

        The network's are counted on fake tensors, with its weights. Two rows of tiles as wide as the image hold logits,
        and what is done of them; the largest logit of a pixel is a number of 8 bytes for a moment.
        """
        if tile not in self._counted:
            self._counted[tile] = measure.count(lambda: self._fake(tile))[1]
        rows = tile[0] * max(tile[1], size[1])
        return self._counted[tile] + rows * (3 * 4 * (len(self.recipe.classes) + 1) + 8) + A_PIXEL * size[0] * size[1]

    def _fake(self, tile: tuple[int, int]) -> measure.Step:
        network, autocast = build(self.recipe).eval(), self.recipe.autocast(torch.device("cpu"))

        def call(x: Tensor) -> Tensor:
            with autocast:
                return network(x)["out"].float()

        return measure.forward(call, torch.empty(1, 3, *tile))

    @torch.inference_mode()
    def labels(self, image: Tensor, tile: tuple[int, int], advance: Callable[[], None]) -> np.ndarray:
        """The class of every pixel [H, W], uint8, of an image of bytes [3, H, W]: what evaluation scores.

        `advance` is called after every tile.
        """

        def logits(x: Tensor) -> Tensor:
            y = self.network(x)["out"]
            advance()
            return y

        def prepare(x: Tensor) -> Tensor:
            return normalised_image(x.to(self.device))

        labels, row = np.empty(image.shape[1:], np.uint8), 0
        with self.recipe.autocast(self.device):
            for strip in strips(logits, image.unsqueeze(0), tile, prepare):
                labels[row : row + strip.shape[2]] = strip[0].argmax(0).to(torch.uint8).cpu().numpy()
                row += strip.shape[2]
        return labels


def _halved(side: int) -> int:
    return side if side <= SMALLEST else max(SMALLEST, side // 2)


def tiles(size: tuple[int, int], tile: tuple[int, int]) -> int:
    """How many tiles an image of (height, width) has."""
    down, across = (len(window_starts(length, window)) for length, window in zip(size, tile, strict=True))
    return down * across


def opened(path: Path) -> Image.Image:
    """An image as it is shown, in RGB.

    Raises:
        InputError: it cannot be read, or is none.
    """
    return coloured(upright(read(path, whole=True)), path)


def as_bytes(image: Image.Image) -> Tensor:
    """An image as a tensor [3, H, W], uint8."""
    return F.pil_to_tensor(image)


@contextmanager
def large_images() -> Iterator[None]:
    """Images of any size are read: those who call have looked at what they need."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
