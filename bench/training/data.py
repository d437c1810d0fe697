"""Images and labels from folders as their publishers lay them out, augmented: sample n is a function of (seed, n)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets, models, tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from bench.training import InputError
from bench.training.recipe import IGNORED, Recipe, Stream, seed_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet: what torchvision's weights expect
UNKNOWN = 254  # in a table of labels: no file may hold it

Paths = Sequence[tuple[Path, Path]]  # of images and their labels


@dataclass(frozen=True)
class DataSet:
    """How one data set is stored, and what its labels mean.

    Args:
        layout: of its folder, for a reader.
        find: (folder, "train" or "val") -> paths.
        ids: the value in the label files of every class, in the order of the classes.
        names: of the classes.
        void: further values, which have no class.
        mirrored: pairs of classes that a flip exchanges, as left and right arms.
    """

    layout: str
    find: Callable[[Path, str], Iterable[tuple[Any, Any]]]
    ids: Sequence[int]
    names: Sequence[str]
    void: Sequence[int] = (IGNORED,)
    mirrored: Sequence[tuple[int, int]] = ()

    def paths(self, folder: Path, split: str) -> Paths:
        """The images of a split and their labels, sorted.

        Raises:
            InputError: there are none, or an image lacks its label.
        """
        try:
            found = sorted((Path(image), Path(label)) for image, label in self.find(folder, split))
        except (RuntimeError, OSError):  # what torchvision raises where it does not find a folder
            found = []
        if not found:
            raise InputError(f"{folder} has no images of the split {split!r}; expected is\n{self.layout}")
        if missing := [label for _, label in found if not label.is_file()]:
            more = f", nor {len(missing) - 1} others" if len(missing) > 1 else ""
            raise InputError(f"{missing[0]} is not there{more}; expected is\n{self.layout}")
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


def cityscapes(folder: Path, split: str) -> Iterable[tuple[Any, Any]]:
    found = datasets.Cityscapes(folder, split, target_type="semantic")
    return ((image, label) for image, (label,) in zip(found.images, found.targets, strict=True))


def voc(folder: Path, split: str) -> Iterable[tuple[Any, Any]]:
    found = datasets.VOCSegmentation(folder, image_set=split)
    return zip(found.images, found.masks, strict=True)


def beside(images: str, labels: str, **splits: str) -> Callable[[Path, str], Iterable[tuple[Any, Any]]]:
    """JPEGs in one folder, PNGs of the same names in another; "*" in the folders' names is what the split is called."""

    def find(folder: Path, split: str) -> Iterable[tuple[Any, Any]]:
        of_images, of_labels = (folder / name.replace("*", splits[split]) for name in (images, labels))
        return ((image, of_labels / f"{image.stem}.png") for image in of_images.glob("*.jpg"))

    return find


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
        layout="""\
  DIR
  ├── leftImg8bit
  │   ├── train / CITY / CITY_000000_000019_leftImg8bit.png ...
  │   └── val / ...
  └── gtFine
      ├── train / CITY / CITY_000000_000019_gtFine_labelIds.png ...
      └── val / ...""",
        find=cityscapes,
        ids=[c.id for c in _SCORED],
        names=[c.name for c in _SCORED],
        void=[IGNORED, *(c.id for c in datasets.Cityscapes.classes if c.train_id == IGNORED)],
    ),
    "ade20k": DataSet(
        layout="""\
  DIR (ADEChallengeData2016)
  ├── images
  │   ├── training / ADE_train_00000001.jpg ...
  │   └── validation / ...
  └── annotations
      ├── training / ADE_train_00000001.png ...
      └── validation / ...""",
        find=beside("images/*", "annotations/*", train="training", val="validation"),
        ids=range(1, 151),
        names=[str(i) for i in range(1, 151)],
        void=[0, IGNORED],
    ),
    "lip": DataSet(
        layout="""\
  DIR
  ├── train_images / 77_471474.jpg ...
  ├── train_segmentations / 77_471474.png ...
  ├── val_images / ...
  └── val_segmentations / ...""",
        find=beside("*_images", "*_segmentations", train="train", val="val"),
        ids=range(len(_LIP)),
        names=_LIP,
        mirrored=[(14, 15), (16, 17), (18, 19)],
    ),
    "voc": DataSet(
        layout="""\
  DIR
  └── VOCdevkit
      └── VOC2012
          ├── ImageSets / Segmentation / train.txt, val.txt
          ├── JPEGImages / 2007_000032.jpg ...
          └── SegmentationClass / 2007_000032.png ...""",
        find=voc,
        ids=range(21),
        names=models.segmentation.FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"],
    ),
    "coco": DataSet(
        layout="""\
  DIR (COCO-Stuff 164k)
  ├── images
  │   ├── train2017 / 000000000009.jpg ...
  │   └── val2017 / ...
  └── annotations (stuffthingmaps)
      ├── train2017 / 000000000009.png ...
      └── val2017 / ...""",
        find=beside("images/*", "annotations/*", train="train2017", val="val2017"),
        ids=_COCO,
        names=[str(i) for i in _COCO],
        void=[IGNORED, *_COCO_UNUSED],
    ),
}


def load(image: Path, label: Path, classes: Tensor) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """An image [3, H, W], uint8, and the class of every pixel [1, H, W], uint8.

    Raises:
        InputError: no file of one number a pixel, another size, or a number without a meaning.
    """
    with Image.open(image) as picture, Image.open(label) as values:
        if values.mode not in ("L", "P") or values.size != picture.size:
            wanted = f"one byte a pixel and the {picture.width}x{picture.height} pixels of {image.name}"
            raise InputError(f"{label} must have {wanted}, got {values.width}x{values.height} of mode {values.mode}")
        numbers = F.pil_to_tensor(values)
        mask = classes[numbers.long()].to(torch.uint8)
        if bool((mask == UNKNOWN).any()):
            unknown = numbers[mask == UNKNOWN].unique().tolist()
            raise InputError(f"{label} must hold numbers of classes, got {', '.join(map(str, unknown))}")
        return tv_tensors.Image(F.pil_to_tensor(picture.convert("RGB"))), tv_tensors.Mask(mask)


class RandomScale(v2.Transform):
    """Both sides times one factor, uniform between two."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        factor = float(torch.empty(()).uniform_(self.low, self.high))
        return {"size": [max(1, round(factor * height)), max(1, round(factor * width))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.resize(inpt, params["size"], antialias=True)  # masks: the nearest pixel


class RandomFlip(v2.RandomHorizontalFlip):
    """Left and right exchanged every other time, also in what the classes mean."""

    def __init__(self, mirror: Tensor) -> None:
        super().__init__()
        self.mirror = mirror

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        flipped = super().transform(inpt, params)
        if not isinstance(flipped, tv_tensors.Mask):
            return flipped
        return tv_tensors.Mask(self.mirror[flipped.long()].to(torch.uint8))


def normalised() -> v2.Transform:
    """Images to fp32 and ImageNet's statistics, labels to int64."""
    kinds: dict[Any, torch.dtype] = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}
    return v2.Compose([v2.ToDtype(kinds, scale=True), v2.Normalize(MEAN, STD)])


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """An endless stream of training samples, epoch after epoch: image [3, h, w] and label [h, w] of the crop's size.

    Args:
        data: which classes there are.
        paths: of the files.
        recipe: the crop, the jitter and the seed.

    >>> Samples(DATA_SETS["voc"], paths, recipe)[1234]  # doctest: +SKIP
    """

    def __init__(self, data: DataSet, paths: Paths, recipe: Recipe) -> None:
        self.paths, self.classes, self.seed = paths, data.classes, recipe.seed
        outside: dict[Any, Any] = {tv_tensors.Image: [round(255 * m) for m in MEAN], tv_tensors.Mask: IGNORED}
        self.augment = v2.Compose(
            [
                RandomScale(*recipe.jitter),
                v2.RandomCrop(recipe.crop, pad_if_needed=True, fill=outside),
                RandomFlip(data.mirror),
                normalised(),
            ]
        )

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(n, len(self.paths))
        image, label = self.paths[_order(self.seed, epoch, len(self.paths))[place]]
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(seed_of(self.seed, Stream.AUGMENTATION, n))
            x, y = self.augment(*load(image, label, self.classes))
        return x.as_subclass(Tensor), y.as_subclass(Tensor).squeeze(0)


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, length: int) -> np.ndarray:
    """In which order an epoch takes the files."""
    return np.random.default_rng(seed_of(seed, Stream.ORDER, epoch)).permutation(length)


def batches(first: int, recipe: Recipe, rank: int, processes: int) -> Iterable[list[int]]:
    """The samples that one process takes in each iteration from the `first` on; all together take them in order."""
    share = recipe.batch // processes
    for iteration in range(first, recipe.iterations):
        begin = iteration * recipe.batch + rank * share
        yield list(range(begin, begin + share))


class Whole(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels as they are, for evaluation: [3, H, W] and [H, W]."""

    def __init__(self, data: DataSet, paths: Paths) -> None:
        self.paths, self.classes, self.normalise = paths, data.classes, normalised()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image, label = self.paths[i]
        x, y = self.normalise(*load(image, label, self.classes))
        return x.as_subclass(Tensor), y.as_subclass(Tensor).squeeze(0)
