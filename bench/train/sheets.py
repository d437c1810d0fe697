"""Pictures of predictions: overlays in colour with a legend, and a contact sheet of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bench.train.classes import Classes, Colour

OVERLAY = 1600  # pixels of the longer side, at most: more than a screen shows
SEEN_THROUGH = 0.5  # how much of the photograph an overlay leaves
THUMB = (232, 174)  # width and height that a picture on the contact sheet fits into
COLUMNS = 2  # of images, each beside its overlay
MOST = 48  # images on a contact sheet
MARGIN, LINE = 8, 22  # pixels
INK, PAPER = (32, 32, 32), (255, 255, 255)


@cache
def font(size: int = 13) -> ImageFont.FreeTypeFont:
    """matplotlib's own: it has Latin, Greek and Cyrillic letters, and lies on every machine that runs this."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def shrunk(image: Image.Image, width: int, height: int) -> Image.Image:
    """An image that fits into so many pixels; a smaller one as it is."""
    factor = min(1.0, width / image.width, height / image.height)
    size = tuple(max(1, round(factor * side)) for side in image.size)
    return image if factor == 1 else image.resize((size[0], size[1]), Image.Resampling.LANCZOS, reducing_gap=2.0)


def blended(image: Image.Image, labels: np.ndarray, classes: Classes) -> Image.Image:
    """An image seen through the colours of its classes; labels [H, W] of any size are scaled to it."""
    nearest = Image.fromarray(labels).resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image, Image.fromarray(classes.palette[np.asarray(nearest)]), 1 - SEEN_THROUGH)


def overlay(image: Image.Image, labels: np.ndarray, classes: Classes) -> Image.Image:
    """An image seen through the colours of its classes, above a legend that says the share of each."""
    seen = blended(image, labels, classes)
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    order = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
    entries = [(f"{classes.names[i]} {100 * counts[i] / labels.size:.1f} %", _colour(classes, i)) for i in order]
    return below_each_other([seen, legend(entries, max(seen.width, 160))])


def _colour(classes: Classes, i: int) -> Colour:
    red, green, blue = classes.palette[i].tolist()
    return red, green, blue


def cut(text: str, width: float) -> str:
    """A text that fits into a width, with an ellipsis for what does not."""
    if font().getlength(text) <= width:
        return text
    while text and font().getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def legend(entries: Sequence[tuple[str, Colour]], width: int) -> Image.Image:
    """Names, each behind a patch of its colour, in as many lines as they need."""
    patch = LINE - 8
    places, x, y = [], MARGIN, MARGIN // 2
    for name, colour in entries:
        text = cut(name, width - 3 * MARGIN - patch)
        wide = patch + MARGIN + round(font().getlength(text))
        if x > MARGIN and x + wide > width - MARGIN:
            x, y = MARGIN, y + LINE
        places.append((x, y, text, colour))
        x += wide + 2 * MARGIN
    sheet = Image.new("RGB", (width, y + LINE + MARGIN // 2), PAPER)
    draw = ImageDraw.Draw(sheet)
    for x, y, text, colour in places:
        draw.rectangle((x, y + 4, x + patch, y + 4 + patch), fill=colour, outline=INK)
        draw.text((x + patch + MARGIN, y + 4 + patch / 2), text, INK, font(), anchor="lm")
    return sheet


def below_each_other(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures on one sheet, as wide as the widest."""
    sheet = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), PAPER)
    y = 0
    for picture in pictures:
        sheet.paste(picture, (0, y))
        y += picture.height
    return sheet


@dataclass
class ContactSheet:
    """Images beside their overlays, small, with names and one legend.

    Args:
        title: what stands above.
        classes: of the labels.
    """

    title: str
    classes: Classes
    _cells: list[Image.Image] = field(default_factory=list)
    _seen: set[int] = field(default_factory=set)

    def add(self, name: str, image: Image.Image, labels: np.ndarray) -> None:
        """One image, small or not, and its labels [H, W] of any size."""
        small = shrunk(image, *THUMB)
        cell = Image.new("RGB", (2 * THUMB[0] + MARGIN // 2, THUMB[1] + LINE), PAPER)
        for i, picture in enumerate((small, blended(small, labels, self.classes))):
            cell.paste(picture, (i * (THUMB[0] + MARGIN // 2), THUMB[1] - small.height))
        text = cut(f"{name}, {labels.shape[1]}x{labels.shape[0]}", cell.width)
        ImageDraw.Draw(cell).text((0, THUMB[1] + LINE / 2), text, INK, font(), anchor="lm")
        self._cells.append(cell)
        self._seen |= set(np.unique(labels).tolist())

    def drawn(self) -> Image.Image:
        """The whole sheet."""
        width = COLUMNS * (self._cells[0].width + MARGIN) + MARGIN
        head = Image.new("RGB", (width, LINE + MARGIN), PAPER)
        text = cut(self.title, width - 2 * MARGIN)
        ImageDraw.Draw(head).text((MARGIN, (LINE + MARGIN) / 2), text, INK, font(), anchor="lm")
        entries = [(self.classes.names[i], _colour(self.classes, i)) for i in sorted(self._seen)]
        return below_each_other([head, *self._rows(width), legend(entries, width)])

    def _rows(self, width: int) -> Iterator[Image.Image]:
        for first in range(0, len(self._cells), COLUMNS):
            row = Image.new("RGB", (width, self._cells[0].height + MARGIN), PAPER)
            for i, cell in enumerate(self._cells[first : first + COLUMNS]):
                row.paste(cell, (MARGIN + i * (cell.width + MARGIN), 0))
            yield row


def spread(count: int, most: int = MOST) -> set[int]:
    """Which of so many images a contact sheet shows: all, or some from the first to the last at even distances."""
    shown = min(count, most)
    return {round(i * (count - 1) / max(1, shown - 1)) for i in range(shown)}
