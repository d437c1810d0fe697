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
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets, models, tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from bench.train.classes import UNKNOWN, Classes
from bench.train.recipe import IGNORED, InputError, Recipe, Stream, seed_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet: what torchvision's weights expect
IMAGES, LABELS = (".jpg", ".jpeg", ".png"), (".png",)  # how files may end, in capitals too, whatever the publishers' do
OWN = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")  # images and labels of one's own
LOSSY = {"JPEG": "JPEG is lossy", "WEBP": "WebP is lossy unless told"}  # what one reads is not what one wrote
ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # the last bytes of whole files, by PIL's name of the format

MANY = 16  # numbers without a meaning that are named of one file

Paths = Sequence[tuple[Path, Path]]  # of images and their labels


@dataclass(frozen=True)
class DataSet:
    """How one data set is stored, and what its labels mean.

    Args:
        images, labels: where they are in its folder. "SPLIT" stands for a split's name, "*" (or "**/*", with folders)
            for what an image's path and its label's have in common.
        classes: what its labels mean.
        splits: names of the images to train on and to validate with.
        listing: the file with what "*" stands for; without one, all images that are there.
        own: whether it is one's own: files may end as `OWN` says, every label must have its image too, and images are
            as EXIF turns them, since that is how tools show them to those who draw labels.
    """

    images: str
    labels: str
    classes: Classes
    splits: tuple[str, str] = ("train", "val")
    listing: str | None = None
    own: bool = False

    def layout(self, split: str) -> list[str]:
        """Where the images of a split ("train" or "val"), their labels and, if there is one, their listing are."""
        name = self.splits[("train", "val").index(split)]
        return [path.replace("SPLIT", name) for path in (self.images, self.labels, self.listing) if path]

    def expected(self, split: str) -> str:
        """The layout, to those whose folder has another."""
        ends = f"where {'files' if self.own else 'images'} end in {', '.join(self._ends()[0])}, in capitals or not"
        return "\n".join(["expected is", *(f"  DIR/{path}" for path in self.layout(split)), ends])

    def _ends(self) -> tuple[Sequence[str], Sequence[str]]:
        return (OWN, OWN) if self.own else (IMAGES, LABELS)

    def find(self, folder: Path, split: str) -> tuple[Paths, list[InputError]]:
        """The images of a split and their labels, sorted, and the files whose partner is missing.

        Raises:
            InputError: there are no images, or two of one name.
        """
        images, labels, *listing = self.layout(split)
        star = "**/*" if "**/*" in images else "*"
        pictures, theirs = (
            _files(folder, pattern, star, ends) for pattern, ends in zip((images, labels), self._ends(), strict=True)
        )
        lists = [folder / path for path in listing]
        listed = [name for file in lists if file.is_file() for name in file.read_text().split()]
        names = sorted(listed if listing else pictures)
        if not names:
            raise InputError(f"{folder} has no images of the split {split!r}; {self.expected(split)}")
        found, missing = [], []
        for name in names:
            image = pictures.get(name, folder / images.replace(star, name))
            label = theirs.get(name, folder / labels.replace(star, name))
            absent = [path for path, group in ((image, pictures), (label, theirs)) if name not in group]
            if not absent:
                found.append((image, label))
            elif self.own:
                missing.append(InputError(f"{image} has no label of its name", image))
            else:
                missing += [InputError(f"{path} is not there", path) for path in absent]
        lonely = sorted(path for name, path in theirs.items() if name not in pictures) if self.own else []
        missing += [InputError(f"{path} has no image of its name", path) for path in lonely]
        return sorted(found), missing

    def paths(self, folder: Path, split: str) -> Paths:
        """The images of a split and their labels, sorted; each pair is one as far as that shows without decoding it.

        Raises:
            InputError: there are none, a file lacks its partner, or what `read_pair` raises.
        """
        found, missing = self.find(folder, split)
        if missing:
            more = f", nor {len(missing) - 1} others" if len(missing) > 1 else ""
            raise InputError(f"{missing[0]}{more}; {self.expected(split)}")
        # Headers and last bytes show what is no picture, truncated or of another size, in half a millisecond a pair.
        # Decoding takes 20 times as long, at every start: damage amid a file is left for training to find and name.
        with ThreadPoolExecutor() as pool:
            list(pool.map(partial(read_pair, data=self, whole=False), *zip(*found, strict=True)))
        return found


def own(classes: Classes) -> DataSet:
    """A data set of one's own."""
    return DataSet("images/SPLIT/**/*", "labels/SPLIT/**/*", classes, own=True)


def data_set(recipe: Recipe) -> DataSet:
    """What a recipe is for."""
    return own(recipe.classes) if recipe.data_set == "folder" else DATA_SETS[recipe.data_set]


_SCORED = sorted((c for c in datasets.Cityscapes.classes if c.train_id not in (-1, IGNORED)), key=lambda c: c.train_id)
_LIP = (
    *("background", "hat", "hair", "glove", "sunglasses", "upper-clothes", "dress", "coat", "socks", "pants"),
    *("jumpsuit", "scarf", "skirt", "face", "left-arm", "right-arm", "left-leg", "right-leg", "left-shoe"),
    "right-shoe",
)
# Ids less 1 that COCO's lists have and its annotations do not: 80 things and 91 stuff classes remain.
_COCO_UNUSED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
_COCO = tuple(i for i in range(182) if i not in _COCO_UNUSED)

DATA_SETS: dict[str, DataSet] = {
    "cityscapes": DataSet(
        images="leftImg8bit/SPLIT/**/*_leftImg8bit.png", labels="gtFine/SPLIT/**/*_gtFine_labelIds.png",
        classes=Classes(
            tuple(c.name for c in _SCORED), tuple(c.id for c in _SCORED),
            ignored=(IGNORED, *(c.id for c in datasets.Cityscapes.classes if c.train_id == IGNORED)),
            colours=tuple(c.color for c in _SCORED),
        ),
    ),
    "ade20k": DataSet(  # ADEChallengeData2016
        images="images/SPLIT/*.jpg", labels="annotations/SPLIT/*.png", splits=("training", "validation"),
        classes=Classes(tuple(map(str, range(1, 151))), tuple(range(1, 151)), ignored=(0, IGNORED)),
    ),
    "lip": DataSet(
        images="SPLIT_images/*.jpg", labels="SPLIT_segmentations/*.png",
        classes=Classes(_LIP, tuple(range(len(_LIP))), (IGNORED,), mirrored=((14, 15), (16, 17), (18, 19))),
    ),
    "voc": DataSet(
        images="VOCdevkit/VOC2012/JPEGImages/*.jpg", labels="VOCdevkit/VOC2012/SegmentationClass/*.png",
        listing="VOCdevkit/VOC2012/ImageSets/Segmentation/SPLIT.txt",
        classes=Classes(
            tuple(models.segmentation.FCN_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]),
            tuple(range(21)), (IGNORED,),
        ),
    ),
    "coco": DataSet(  # COCO-Stuff 164k with the pixel maps of things and stuff
        images="images/SPLIT/*.jpg", labels="annotations/SPLIT/*.png", splits=("train2017", "val2017"),
        classes=Classes(tuple(map(str, _COCO)), _COCO, ignored=(IGNORED, *_COCO_UNUSED)),
    ),
}  # fmt: skip


def _files(folder: Path, pattern: str, star: str, suffixes: Sequence[str]) -> dict[str, Path]:
    """The files of a pattern by what the star stands for, with any of the suffixes; hidden ones are none.

    Raises:
        InputError: two differ in nothing else.
    """
    start, end = pattern.removesuffix(Path(pattern).suffix).split(star)
    found: dict[str, Path] = {}
    for path in folder.glob(f"{start}{star}{end}.*"):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
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
        raise InputError(f"{path} cannot be read: {error}", path) from error


def orientation(picture: Image.Image) -> int:
    """How EXIF turns a picture when it is shown, 1 to 8; from 5 on height becomes width. PIL turns TIFFs itself."""
    return picture.getexif().get(ExifTags.Base.Orientation, 1) if "exif" in picture.info else 1


def upright(picture: Image.Image) -> Image.Image:
    """A picture as it is shown."""
    return ImageOps.exif_transpose(picture) if orientation(picture) > 1 else picture


def shown_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height of a picture when it is shown."""
    return picture.size[::-1] if orientation(picture) > 4 else picture.size


def check_shades(picture: Image.Image, path: Path) -> None:
    """Raises InputError where a picture has numbers that are no shades."""
    if picture.mode in ("I", "F"):
        raise InputError(f"{path} must be an image of 8 or 16 bits a channel, got one of mode {picture.mode}", path)


def coloured(picture: Image.Image, path: Path) -> Image.Image:
    """A picture in RGB of 8 bits: of 16 bits the upper ones are left, and alpha says nothing.

    Raises:
        InputError: it has numbers that are no shades.
    """
    check_shades(picture, path)
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def read_pair(image: Path, label: Path, data: DataSet, whole: bool) -> tuple[Image.Image, Image.Image]:
    """An image and its label, by `read`, of one size.

    Pixels of published data sets are those that files store, whatever EXIF says of how to show them; one's own are as
    they are shown.

    Raises:
        InputError: one cannot be read, or the label holds no numbers of classes, or has another size.
    """
    return matched((read(image, whole), read(label, whole)), (image, label), data, whole)


def matched(
    pictures: tuple[Image.Image, Image.Image], paths: tuple[Path, Path], data: DataSet, whole: bool
) -> tuple[Image.Image, Image.Image]:
    """What was read of an image and its label, as `read_pair` gives it and raises for."""
    (picture, values), (image, label) = pictures, paths
    check_shades(picture, image)
    size, got = (shown_size(each) if data.own else each.size for each in pictures)
    is_label = values.mode in data.classes.modes
    if is_label and got == size:
        return (upright(picture), upright(values)) if data.own and whole else pictures
    hint = ""
    if data.own and not is_label:
        other = "values, as `road 7`" if data.classes.by_colour else "colours, as `road 128 64 128`"
        hint = f"; for such labels list the classes by {other}"
    elif orientation(picture) > 4:
        hint = "; EXIF turns that image when it is shown: "
        hint += "turn the label too" if data.own else "store it upright, or the label as the image is stored"
    wanted = (
        f"one {'colour' if data.classes.by_colour else 'number'} a pixel and the {_by(size)} pixels of {image.name}"
    )
    raise InputError(f"{label} must have {wanted}, got {_by(got)} of mode {values.mode}{hint}", label)


def _by(size: tuple[int, int]) -> str:
    """Width and height as PIL has them."""
    return f"{size[0]}x{size[1]}"


def lossy(label: Image.Image) -> str:
    """What to say of numbers without a meaning in a file that may not hold what was written."""
    return f"; {LOSSY[label.format]}: store labels as PNG" if label.format in LOSSY else ""


def load(image: Path, label: Path, data: DataSet) -> tuple[Tensor, Tensor]:
    """An image [3, H, W], uint8, and the class of every pixel [1, H, W], uint8.

    Raises:
        InputError: as `read_pair`, or a number without a meaning.
    """
    picture, values = read_pair(image, label, data, whole=True)
    numbers = data.classes.read(values)
    mask = data.classes.table[numbers]
    if (mask == UNKNOWN).any():
        unknown = ", ".join(map(data.classes.word, np.unique(numbers[mask == UNKNOWN])[:MANY].tolist()))
        what = "colours" if data.classes.by_colour else "numbers"
        raise InputError(f"{label} must hold {what} of classes, got {unknown}{lossy(values)}", label)
    return tv_tensors.Image(F.pil_to_tensor(coloured(picture, image))), tv_tensors.Mask(mask[None])


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
    return normalised_image(image).as_subclass(Tensor), label.as_subclass(Tensor).squeeze(0).long()


def normalised_image(image: Tensor) -> Tensor:
    """An image [..., 3, H, W] of bytes in fp32 and ImageNet's statistics."""
    return F.normalize(F.to_dtype(image, torch.float32, scale=True), list(MEAN), list(STD))


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """Images [3, H, W] and labels [H, W] as they are, for evaluation."""

    def __init__(self, data: DataSet, paths: Paths) -> None:
        self.paths, self.data, self.mirror = paths, data, data.classes.mirror

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        return normalised(*load(*self.paths[n], self.data))


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
        image, label = load(*self.paths[order[place]], self.data)
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
