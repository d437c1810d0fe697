"""Data sets of `bench train`: labels mean what their publishers say, samples are functions of the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision import datasets, tv_tensors

from bench.train import data as loading
from bench.train.data import DATA_SETS, MEAN, STD, DataSet, RandomSamples, flip, random_scale
from bench.train.recipe import IGNORED, InputError
from tests import segmentation_data
from tests.segmentation_data import IDS, SIZE, colours, save
from tests.small_network import recipe


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segmentation_data.cityscapes(tmp_path_factory.mktemp("cityscapes"))


def samples(folder: Path, **changes: Any) -> RandomSamples:
    wanted = recipe(**changes)
    data = DATA_SETS[wanted.data_set]
    return RandomSamples(data, data.paths(folder, "train"), wanted)


def test_a_sample_is_a_function_of_the_seed_and_its_number(city: Path) -> None:
    first, again, other = samples(city), samples(city), samples(city, seed=1)
    drawn = {n: first[n] for n in (12, 3, 7)}
    torch.rand(5)
    state = torch.get_rng_state()
    for n, (image, label) in drawn.items():
        assert torch.equal(image, again[n][0])
        assert torch.equal(label, again[n][1])
        assert not torch.equal(image, other[n][0])
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first[7][0], first[12][0])


def test_every_epoch_has_every_image_once_in_another_order(city: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, taken = samples(city), []

    def load(image: Path, label: Path, data: DataSet) -> tuple[Tensor, Tensor]:
        taken.append(stream.paths.index((image, label)))
        return original(image, label, data)

    original = loading.load
    monkeypatch.setattr(loading, "load", load)
    for n in range(15):
        stream[n]
    epochs = [taken[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_labels_move_with_their_images(city: Path) -> None:
    """What is left of the image's colour says which label there must be; outside the image there is none."""
    stream = samples(city, crop=(40, 100))
    palette = torch.tensor(colours(np.arange(len(IDS)), len(IDS)))  # of the classes that occur, in the order of IDS
    classes = torch.from_numpy(DATA_SETS["cityscapes"].classes.table)[list(IDS)]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    shares, outside = [], 0
    for n in range(12):
        image, label = stream[n]
        assert image.shape == (3, 40, 100)
        assert (image.dtype, label.shape, label.dtype) == (torch.float32, (40, 100), torch.int64)
        inside = label != IGNORED
        assert bool((image[:, ~inside].abs() < 0.5 / 255 / min(STD) + 1e-6).all())
        outside += int((~inside).sum())
        pixels = (image * std + mean).mul(255)[:, inside].T  # [pixels, 3]
        shares.append(float((classes[torch.cdist(pixels, palette.float()).argmin(1)] == label[inside]).float().mean()))
    assert min(shares) > 0.8  # blocks' edges are blurred
    assert outside > 0


def test_scales_are_those_of_the_recipe() -> None:
    image, label = torch.zeros(3, *SIZE, dtype=torch.uint8), torch.zeros(1, *SIZE, dtype=torch.uint8)
    scaled = [random_scale(tv_tensors.Image(image), tv_tensors.Mask(label), *recipe().jitter) for _ in range(200)]
    assert all(x.shape[1:] == y.shape[1:] for x, y in scaled)
    sizes = torch.tensor([x.shape[1:] for x, _ in scaled]) / torch.tensor(SIZE)
    assert (sizes[:, 0] - sizes[:, 1]).abs().max() < 1 / 48
    assert 0.49 < sizes.min() < 0.6
    assert 1.9 < sizes.max() < 2.01


def test_a_flip_makes_left_arms_right() -> None:
    label = torch.randint(20, (1, 4, 6), dtype=torch.uint8)
    image, flipped = flip(label.expand(3, -1, -1), label, DATA_SETS["lip"].classes.mirror)
    other = {14: 15, 15: 14, 16: 17, 17: 16, 18: 19, 19: 18}
    expected = [[other.get(int(c), int(c)) for c in row] for row in label[0].flip(-1)]
    assert flipped[0].tolist() == expected
    assert torch.equal(image, label.expand(3, -1, -1).flip(-1))


def test_labels_mean_what_their_publishers_say() -> None:
    for c in datasets.Cityscapes.classes:
        if c.id >= 0:
            assert DATA_SETS["cityscapes"].classes.table[c.id] == c.train_id
    assert {name: len(data.classes) for name, data in DATA_SETS.items()} == {
        "cityscapes": 19,
        "ade20k": 150,
        "lip": 20,
        "voc": 21,
        "coco": 171,
    }
    for data in DATA_SETS.values():
        classes = data.classes
        assert len(classes.names) == len(classes.numbers) == len(classes.palette)
        assert classes.table[list(classes.numbers)].tolist() == list(range(len(classes)))
        assert classes.table[IGNORED] == IGNORED
    assert DATA_SETS["ade20k"].classes.table[:3].tolist() == [IGNORED, 0, 1]
    assert DATA_SETS["coco"].classes.table[[0, 10, 11, 12, 181]].tolist() == [0, 10, IGNORED, 11, 170]


@pytest.mark.parametrize(
    ("name", "image", "label"),
    [
        ("ade20k", "images/{}/a.jpg", "annotations/{}/a.png"),
        ("coco", "images/{}/a.jpg", "annotations/{}/a.png"),
        ("lip", "{}_images/a.jpg", "{}_segmentations/a.png"),
    ],
)
def test_folders_are_found_as_their_layout_says(name: str, image: str, label: str, tmp_path: Path) -> None:
    data = DATA_SETS[name]
    splits = {"ade20k": ("training", "validation"), "coco": ("train2017", "val2017"), "lip": ("train", "val")}[name]
    for ours, theirs in zip(("train", "val"), splits, strict=True):
        pair = tmp_path / image.format(theirs), tmp_path / label.format(theirs)
        for path, pattern in zip(pair, data.layout(ours), strict=True):
            assert path.relative_to(tmp_path).match(pattern)
            save(path, np.zeros((4, 6, 3) if path.suffix == ".jpg" else (4, 6), np.uint8))
        assert data.paths(tmp_path, ours) == [pair]
    pair[1].unlink()
    with pytest.raises(InputError, match=r"a\.png is not there; expected is"):
        data.paths(tmp_path, "val")


@pytest.fixture
def lip(tmp_path: Path) -> Path:
    """An image and its label to train on, and a pair to validate with."""
    return segmentation_data.lip(tmp_path)


@pytest.mark.parametrize("name", ["a.jpeg", "a.JPG", "a.png", "a.b.Png"])
def test_images_end_as_they_like(name: str, lip: Path) -> None:
    label = lip / "train_segmentations" / f"{Path(name).stem}.PNG"
    image = lip / "train_images" / name
    (lip / "train_images" / "a.jpg").rename(image)
    (lip / "train_segmentations" / "a.png").rename(label)
    assert DATA_SETS["lip"].paths(lip, "train") == [(image, label)]
    image.with_suffix(".jpg").touch()
    with pytest.raises(InputError, match=r"must be the one picture of its name, and there is a\."):
        DATA_SETS["lip"].paths(lip, "train")


@pytest.mark.parametrize("name", ["2007_000039.JPG", "2007_000039.png"])
def test_images_of_a_listing_end_as_they_like(name: str, tmp_path: Path) -> None:
    images = segmentation_data.voc(tmp_path) / "VOCdevkit" / "VOC2012" / "JPEGImages"
    (images / "2007_000039.jpg").rename(images / name)
    assert [image.name for image, _ in DATA_SETS["voc"].paths(tmp_path, "train")] == [
        "2007_000032.jpg",
        name,
        "2007_000063.jpg",
    ]
    (images / name).unlink()
    with pytest.raises(InputError, match=r"2007_000039\.jpg is not there; expected is"):
        DATA_SETS["voc"].paths(tmp_path, "train")


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_labels_that_are_upright_where_exif_turns_the_image_are_told_so(kind: str, orientation: int, lip: Path) -> None:
    image, label = lip / "train_images" / "a.jpg", lip / "train_segmentations" / "a.png"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    with Image.open(image) as picture:
        picture.save(image.with_suffix(f".{kind}"), exif=exif)
    if kind == "png":
        image.unlink()
    assert len(DATA_SETS["lip"].paths(lip, "train")) == 1  # the label is as the image is stored
    save(label, np.zeros(SIZE[::-1], np.uint8))
    with pytest.raises(InputError, match=r"the 80x48 pixels of a\.(jpg|png), got 48x80 of mode L") as raised:
        DATA_SETS["lip"].paths(lip, "train")
    assert ("EXIF turns that image when it is shown" in str(raised.value)) == (orientation == 6)
