"""Images and labels from folders as their publishers lay them out, augmented: sample n is a function of (seed, n)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets, models, tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from bench.train.recipe import IGNORED, InputError, Recipe, Stream, seed_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet: what torchvision's weights expect
UNKNOWN = 254  # in a table of labels: no file may hold it
IMAGES, LABELS = (".jpg", ".jpeg", ".png"), (".png",)  # how files may end, in capitals too, whatever the publishers' do
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # the last bytes of whole files, by PIL's name of the format

Paths = Sequence[tuple[Path, Path]]  # of images and their labels


@dataclass(frozen=True)
class DataSet:
    """How one data set is stored, and what its labels mean.

    Args:
        images, labels: where they are in its folder. "SPLIT" stands for a split's name, "*" (or "**/*", with folders)
            for what an image's path and its label's have in common.
        ids: the value in the label files of every class, in the order of the classes.
        names: of the classes.
        void: further values, which have no class.
        mirrored: pairs of classes that a flip exchanges, as left and right arms.
        splits: names of the images to train on and to validate with.
        listing: the file with what "*" stands for; without one, all images that are there.
    """

    images: str
    labels: str
    ids: Sequence[int]
    names: Sequence[str]
    void: Sequence[int] = (IGNORED,)
    mirrored: Sequence[tuple[int, int]] = ()
    splits: tuple[str, str] = ("train", "val")
    listing: str | None = None

    def layout(self, split: str) -> list[str]:
        """Where the images of a split ("train" or "val"), their labels and, if there is one, their listing are."""
        name = self.splits[("train", "val").index(split)]
        return [path.replace("SPLIT", name) for path in (self.images, self.labels, self.listing) if path]

    def paths(self, folder: Path, split: str) -> Paths:
        """The images of a split and their labels, sorted; each pair is one as far as that shows without decoding it.

        Raises:
            InputError: there are none, an image lacks its label, or what `read_pair` raises.
        """
        images, labels, *listing = layout = self.layout(split)
        star = "**/*" if "**/*" in images else "*"
        pictures, theirs = _files(folder, images, star, IMAGES), _files(folder, labels, star, LABELS)
        lists = [folder / path for path in listing]
        listed = [name for file in lists if file.is_file() for name in file.read_text().split()]
        found = sorted(
            (
                pictures.get(name, folder / images.replace(star, name)),
                theirs.get(name, folder / labels.replace(star, name)),
            )
            for name in (listed if listing else pictures)
        )
        ends = f"where images end in {', '.join(IMAGES)}, in capitals or not"
        expected = "\n".join(["expected is", *(f"  DIR/{path}" for path in layout), ends])
        if not found:
            raise InputError(f"{folder} has no images of the split {split!r}; {expected}")
        if missing := [path for pair in found for path in pair if not path.is_file()]:
            more = f", nor {len(missing) - 1} others" if len(missing) > 1 else ""
            raise InputError(f"{missing[0]} is not there{more}; {expected}")
        # Headers and last bytes show what is no picture, truncated or of another size, in half a millisecond a pair.
        # Decoding takes 20 times as long, at every start: damage amid a file is left for training to find and name.
        with ThreadPoolExecutor() as pool:
            list(pool.map(partial(read_pair, whole=False), *zip(*found, strict=True)))
        return found

    @property
    def classes(self) -> Tensor:
        """The class of every value of a label file, [256]."""
        table = torch.full((256,), UNKNOWN)
        table[list(self.void)] = IGNORED
        table[list(self.ids)] = torch.arange(len(self.ids))
        return table

    @property
    def mirror(self) -> Tensor:
        """What a flip makes of every class, [256]."""
        table = torch.arange(256)
        for left, right in self.mirrored:
            table[[left, right]] = table[[right, left]]
        return table


_SCORED = sorted((c for c in datasets.Cityscapes.classes if c.train_id not in (-1, IGNORED)), key=lambda c: c.train_id)
_LIP = (
    *("background", "hat", "hair", "glove", "sunglasses", "upper-clothes", "dress", "coat", "socks", "pants"),
    *("jumpsuit", "scarf", "skirt", "face", "left-arm", "right-arm", "left-leg", "right-leg", "left-shoe"),
    "right-shoe",
)
# Ids less 1 that COCO's lists have and its annotations do not: 80 things and 91 stuff classes remain.
_COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
_COCO = [i for i in range(182) if i not in _COCO_UNUSED]

DATA_SETS: dict[str, DataSet] = {
    "cityscapes": DataSet(
        images="leftImg8bit/SPLIT/**/*_leftImg8bit.png", labels="gtFine/SPLIT/**/*_gtFine_labelIds.png",
        ids=[c.id for c in _SCORED], names=[c.name for c in _SCORED],
        void=[IGNORED, *(c.id for c in datasets.Cityscapes.classes if c.train_id == IGNORED)],
    ),
    "ade20k": DataSet(  # ADEChallengeData2016
        images="images/SPLIT/*.jpg", labels="annotations/SPLIT/*.png", splits=("training", "validation"),
        ids=range(1, 151), names=[str(i) for i in range(1, 151)], void=[0, IGNORED],
    ),
    "lip": DataSet(
        images="SPLIT_images/*.jpg", labels="SPLIT_segmentations/*.png",
        ids=range(len(_LIP)), names=_LIP, mirrored=[(14, 15), (16, 17), (18, 19)],
    ),
    "voc": DataSet(
        images="VOCdevkit/VOC2012/JPEGImages/*.jpg", labels="VOCdevkit/VOC2012/SegmentationClass/*.png",
        listing="VOCdevkit/VOC2012/ImageSets/Segmentation/SPLIT.txt",
        ids=range(21), names=models.segmentation.FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"],
    ),
    "coco": DataSet(  # COCO-Stuff 164k with the pixel maps of things and stuff
        images="images/SPLIT/*.jpg", labels="annotations/SPLIT/*.png", splits=("train2017", "val2017"),
        ids=_COCO, names=[str(i) for i in _COCO], void=[IGNORED, *_COCO_UNUSED],
    ),
}  # fmt: skip


def _files(folder: Path, pattern: str, star: str, suffixes: Sequence[str]) -> dict[str, Path]:
    """The files of a pattern by what the star stands for, with any of the suffixes.

    Raises:
        InputError: two differ in nothing else.
    """
    start, end = pattern.removesuffix(Path(pattern).suffix).split(star)
    found: dict[str, Path] = {}
    for path in folder.glob(f"{start}{star}{end}.*"):
        if path.suffix.lower() in suffixes:
            name = path.relative_to(folder).with_suffix("").as_posix().removeprefix(start).removesuffix(end)
            if found.setdefault(name, path) != path:
                raise InputError(f"{found[name]} must be the one picture of its name, and there is {path.name}")
    return found


def read(path: Path, whole: bool) -> Image.Image:
    """The picture in a file; its pixels too if `whole` is wanted, or the last bytes say that it may not be there.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file, Image.open(path) as picture:
            file.seek(-8, os.SEEK_END)
            if whole or not file.read().endswith(ENDS.get(picture.format or "", b"")):
                picture.load()
            return picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all of which PIL raises
        raise InputError(f"{path} cannot be read: {error}") from error


def read_pair(image: Path, label: Path, whole: bool) -> tuple[Image.Image, Image.Image]:
    """An image and its label, by `read`. Pixels are those that files store, whatever EXIF says of how to show them.

    Raises:
        InputError: one cannot be read, or the label is no file of one number a pixel, or of another size.
    """
    picture, values = read(image, whole), read(label, whole)
    if values.mode not in ("L", "P") or values.size != picture.size:
        wanted = f"one byte a pixel and the {picture.width}x{picture.height} pixels of {image.name}"
        turned = "exif" in picture.info and picture.getexif().get(ExifTags.Base.Orientation, 1) > 4
        hint = "; EXIF turns that image when it is shown: store it upright, or the label as the image is stored"
        got = f"{values.width}x{values.height} of mode {values.mode}{hint * turned}"
        raise InputError(f"{label} must have {wanted}, got {got}")
    return picture, values


def load(image: Path, label: Path, classes: Tensor) -> tuple[Tensor, Tensor]:
    """An image [3, H, W], uint8, and the class of every pixel [1, H, W], uint8.

    Raises:
        InputError: as `read_pair`, or a number without a meaning.
    """
    picture, values = read_pair(image, label, whole=True)
    numbers = F.pil_to_tensor(values)
    mask = classes[numbers.long()].to(torch.uint8)
    if bool((mask == UNKNOWN).any()):
        unknown = numbers[mask == UNKNOWN].unique().tolist()
        raise InputError(f"{label} must hold numbers of classes, got {', '.join(map(str, unknown))}")
    return tv_tensors.Image(F.pil_to_tensor(picture.convert("RGB"))), tv_tensors.Mask(mask)


def random_scale(image: Tensor, label: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Both sides times one factor, uniform between two; labels by the nearest pixel."""
    factor = float(torch.empty(()).uniform_(low, high))
    size = [max(1, round(factor * side)) for side in image.shape[1:]]
    return F.resize(image, size), F.resize(label, size)


def flip(image: Tensor, label: Tensor, mirror: Tensor) -> tuple[Tensor, Tensor]:
    """Left and right exchanged, also in what the classes mean."""
    return F.horizontal_flip(image), mirror[F.horizontal_flip(label).long()]


def normalised(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The image [3, H, W] in fp32 and ImageNet's statistics, the label [H, W] in int64."""
    image = F.normalize(F.to_dtype(image, torch.float32, scale=True), list(MEAN), list(STD))
    return image.as_subclass(Tensor), label.as_subclass(Tensor).squeeze(0).long()


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Images [3, H, W] and labels [H, W] as they are, for evaluation."""

    def __init__(self, data: DataSet, paths: Paths) -> None:
        self.paths, self.classes, self.mirror = paths, data.classes, data.mirror

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        return normalised(*load(*self.paths[n], self.classes))


class RandomSamples(Samples):
    """An endless stream of training samples, epoch after epoch: image [3, h, w] and label [h, w] of the crop's size.

    Args:
        data: which classes there are.
        paths: of the files.
        recipe: the crop, the jitter and the seed.

    >>> RandomSamples(DATA_SETS["voc"], paths, recipe)[1234]  # doctest: +SKIP
    """

    def __init__(self, data: DataSet, paths: Paths, recipe: Recipe) -> None:
        super().__init__(data, paths)
        self.recipe = recipe
        outside: dict[Any, Any] = {tv_tensors.Image: [round(255 * m) for m in MEAN], tv_tensors.Mask: IGNORED}
        self.crop = v2.RandomCrop(recipe.crop, pad_if_needed=True, fill=outside)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(n, len(self.paths))
        order = _order(self.recipe.seed, epoch, len(self.paths))
        image, label = load(*self.paths[order[place]], self.classes)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed_of(self.recipe.seed, Stream.AUGMENTATION, n))
            image, label = self.crop(*random_scale(image, label, *self.recipe.jitter))
            return normalised(*(flip(image, label, self.mirror) if torch.rand(1) < 0.5 else (image, label)))


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, length: int) -> list[int]:
    """In which order an epoch takes the files."""
    return np.random.default_rng(seed_of(seed, Stream.ORDER, epoch)).permutation(length).tolist()


def batches(first: int, recipe: Recipe, rank: int, world_size: int) -> list[list[int]]:
    """The samples that one process takes in each iteration from the `first` on; all together take them in order."""
    share = recipe.batch // world_size
    begins = range(first * recipe.batch + rank * share, recipe.iterations * recipe.batch, recipe.batch)
    return [list(range(begin, begin + share)) for begin in begins]
