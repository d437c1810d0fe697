"""Folders as the publishers of Cityscapes, LIP and VOC 2012 lay them out, of small images; colours say the labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.train.recipe import IGNORED

SIZE = H, W = 48, 80
IDS = (7, 8, 11, 21, 23, 24, 26)  # Cityscapes' numbers of some classes


def save(path: Path, values: np.ndarray, mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    if mode == "P":
        picture = picture.convert("L")
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    picture.save(path)


def blocks(values: Any, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of 16x16 pixels, each with a label and the colour that says which."""
    choice = rng.integers(len(values), size=(H // 16, W // 16)).repeat(16, 0).repeat(16, 1)
    labels = np.asarray(values, np.uint8)[choice]
    return colours(choice, len(values)).astype(np.uint8), labels


def colours(choice: np.ndarray, count: int) -> np.ndarray:
    """A colour for each of the numbers below count."""
    shade = 255 * choice // (count - 1)
    return np.stack([shade, 255 - shade, np.full_like(shade, 90)], -1)


def cityscapes(folder: Path) -> Path:
    """5 images to train and 2 to validate."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for i in range(count):
            image, label = blocks(IDS, rng)
            name = f"aachen_{i:06d}_000019"
            save(folder / "leftImg8bit" / split / "aachen" / f"{name}_leftImg8bit.png", image)
            save(folder / "gtFine" / split / "aachen" / f"{name}_gtFine_labelIds.png", label)
    return folder


def lip(folder: Path) -> Path:
    """1 image to train and 1 to validate, of noise that says nothing."""
    rng = np.random.default_rng(2)
    for split in ("train", "val"):
        save(folder / f"{split}_images" / "a.jpg", rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8))
        save(folder / f"{split}_segmentations" / "a.png", rng.integers(0, 20, SIZE).astype(np.uint8))
    return folder


def voc(folder: Path) -> Path:
    """3 images to train and 1 to validate, whose labels have a palette and void pixels among them."""
    rng = np.random.default_rng(1)
    root = folder / "VOCdevkit" / "VOC2012"
    for split, names in (("train", ("2007_000032", "2007_000039", "2007_000063")), ("val", ("2007_000033",))):
        for name in names:
            image, label = blocks((0, 1, 15, 20, IGNORED), rng)
            save(root / "JPEGImages" / f"{name}.jpg", image)
            save(root / "SegmentationClass" / f"{name}.png", label, mode="P")
        path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{name}\n" for name in names))
    return folder


COLOURS = ((128, 64, 128), (70, 70, 70), (0, 130, 180))  # of three classes of one's own
CLASSES_TXT = {  # by what masks hold
    "colours": "# what we label\nroad 128 64 128\nwall 70 70 70\n\nopen water 0 130 180\nignore 0 0 0\n",
    "values": "road 0\nwall 7\nopen water 255\nignore 99\n",
    "wide": "road 0\nwall 300\nopen water 65535\nignore 99\n",
    "names": "road\nwall\nopen water\nignore 255\n",
}
NUMBERS = {"values": (0, 7, 255, 99), "wide": (0, 300, 65535, 99), "names": (0, 1, 2, 255)}  # the last is ignored


def mask(choice: np.ndarray, kind: str) -> Image.Image:
    """A mask of the classes 0 to 2, and of 3, which is ignored, as tools write them."""
    rgb = np.array([*COLOURS, (0, 0, 0)], np.uint8)[choice]
    if kind == "wide":
        return Image.fromarray(np.array(NUMBERS[kind], np.uint16)[choice])
    if kind in NUMBERS:
        return Image.fromarray(np.array(NUMBERS[kind], np.uint8)[choice])
    if kind == "palette":  # indices that are no classes' values
        picture = Image.fromarray(np.array([9, 4, 30, 2], np.uint8)[choice])
        palette = np.full((256, 3), 13, np.uint8)
        palette[[9, 4, 30, 2]] = [*COLOURS, (0, 0, 0)]
        picture.putpalette(palette.tobytes())
        return picture
    if kind == "RGBA":
        return Image.fromarray(np.dstack([rgb, np.where(choice == 1, 0, 200).astype(np.uint8)]))
    assert kind == "colours"
    return Image.fromarray(rgb)


def own(
    folder: Path,
    kinds: tuple[str, ...] = ("colours", "palette", "RGBA"),
    ends: tuple[str, ...] = ("png", "JPG", "tif", "webp", "bmp"),
    counts: tuple[int, int] = (5, 2),
    listed: str = "colours",
) -> Path:
    """A data set of one's own, of blocks whose colours say their classes; masks of all kinds by turns, in PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.txt").write_text(CLASSES_TXT[listed])
    rng = np.random.default_rng(3)
    for split, count in zip(("train", "val"), counts, strict=True):
        for i in range(count):
            choice = rng.integers(4, size=(H // 16, W // 16)).repeat(16, 0).repeat(16, 1)
            choice[0] = 3
            save(folder / "images" / split / f"scene {i}.{ends[i % len(ends)]}", colours(choice, 4).astype(np.uint8))
            path = folder / "labels" / split / f"scene {i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            mask(choice, kinds[i % len(kinds)]).save(path)
    return folder
