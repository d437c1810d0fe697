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
