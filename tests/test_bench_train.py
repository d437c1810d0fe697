"""`python -m bench train`: interrupted runs go on as if they had not been, and every part of them is its equation.

Folders are made as the data sets' publishers lay theirs out. Runs that are killed are real processes; a network of two
convolutions stands for the ResNet in whole runs.
"""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision import datasets, tv_tensors

from bench import opponents
from bench.__main__ import main
from bench.commands.train import signals
from bench.records import replacing
from bench.training import InputError
from bench.training import run as running
from bench.training.data import DATA_SETS, MEAN, STD, RandomFlip, Samples, batches
from bench.training.evaluate import intersection_over_union, probabilities, slide, starts
from bench.training.recipe import IGNORED
from bench.training.run import Processes, Run
from tests.cases import relative_error
from tests.small_network import recipe, small

ROOT = Path(__file__).parent.parent
SIZE = H, W = 48, 80
IDS = (7, 8, 11, 21, 23, 24, 26)  # Cityscapes' numbers of some classes

# -- folders as the data sets have them --------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cityscapes with 5 images to train and 2 to validate."""
    folder, rng = tmp_path_factory.mktemp("cityscapes"), np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for i in range(count):
            image, label = blocks(IDS, rng)
            name = f"aachen_{i:06d}_000019"
            save(folder / "leftImg8bit" / split / "aachen" / f"{name}_leftImg8bit.png", image)
            save(folder / "gtFine" / split / "aachen" / f"{name}_gtFine_labelIds.png", label)
    return folder


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VOC 2012 with labels that have a palette, and void pixels among them."""
    folder, rng = tmp_path_factory.mktemp("voc"), np.random.default_rng(1)
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


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "ianet", small)


def read(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def losses(out: Path) -> list[list[str]]:
    """The log without its seconds."""
    return [row[:-1] for row in read(out / "log.csv")]


# -- whole runs --------------------------------------------------------------------------------------------------------

ITERATIONS = 121


def command(folder: Path, out: Path, *more: str) -> list[str]:
    arguments = ["train", "--data", str(folder), "--data-set", "cityscapes", "--out", str(out), "--weights", "none"]
    return [*arguments, "--crop", "32x64", "--batch", "2", "--iterations", str(ITERATIONS), "--save-every", "7", *more]


def started(folder: Path, out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # sums in the same order as here
    arguments = [sys.executable, "-m", "tests.small_network", *command(folder, out, "--workers", "1")]
    output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, start_new_session=True, **output)


def awaited(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    """Waits for something that a process does while it runs."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_that_is_killed_and_stopped_ends_as_one_that_is_not(
    city: Path, tmp_path: Path, small_network: None
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    main(command(city, whole, "--workers", "0"))
    checkpoint = broken / "checkpoint.pt"

    killed = started(city, broken)
    awaited(killed, checkpoint.exists)
    killed.kill()
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    first = torch.load(checkpoint, weights_only=True)["iteration"]
    assert first < ITERATIONS
    assert first % 7 == 0

    stopped = started(city, broken)
    assert stopped.stdout is not None
    assert f"goes on after iteration {first}" in stopped.stdout.readline()
    os.killpg(stopped.pid, signal.SIGTERM)  # as Ctrl-C and torchrun do: what loads the images gets it too
    printed, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 0, printed
    second = torch.load(checkpoint, weights_only=True)["iteration"]
    assert first < second < ITERATIONS
    assert f"Stopped after iteration {second}; the same command goes on" in printed

    main(command(city, broken, "--workers", "0"))
    assert losses(broken) == losses(whole)
    assert [row[0] for row in losses(whole)] == ["iteration", *map(str, range(1, ITERATIONS + 1))]
    assert read(broken / "iou.csv") == read(whole / "iou.csv")


def test_a_voc_folder_trains_and_its_checkpoint_evaluates_alone(
    voc: Path, tmp_path: Path, small_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--data", str(voc), "--workers", "0", "--crop", "32x48"]
    more = ["--data-set", "voc", "--iterations", "60", "--batch", "4", "--lr", "0.05", "--precision", "bfloat16"]
    main([*arguments, *more, "--out", str(tmp_path / "a"), "--weights", "none"])
    loss = [float(row[2]) for row in losses(tmp_path / "a")[1:]]
    assert np.mean(loss[-10:]) < 0.6 * loss[0]
    capsys.readouterr()
    evaluation = ["--evaluate", str(tmp_path / "a" / "checkpoint.pt"), "--scales", "0.75", "1.5", "--flip"]
    main([*arguments, *evaluation, "--out", str(tmp_path / "b")])
    for out in ("a", "b"):
        ious = dict(read(tmp_path / out / "iou.csv")[1:])
        assert len(ious) == 21 + 1
        seen = [float(iou) for name, iou in ious.items() if iou and name != "mean"]
        assert float(ious["mean"]) == pytest.approx(np.mean(seen))
        assert ious["aeroplane"]
        assert not ious["boat"]
    assert float(ious["mean"]) > 0.2
    printed = capsys.readouterr().out
    assert "1 images in windows of 32x48, scaled by 0.75 1.5, flipped and not" in printed
    assert re.search(r"aeroplane +0\.\d{4}", printed)


# -- what a run is made of ---------------------------------------------------------------------------------------------


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "checkpoint.pt"
    with replacing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    with pytest.raises(AttributeError), replacing(path) as temporary:
        torch.save({"half": torch.zeros(9), "other": lambda: None}, temporary)  # what cannot be written
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]
    assert path.read_text() == "first"


def test_a_step_teaches_every_part_of_the_network() -> None:
    mine = recipe(head="RCCA", output_stride=32)
    state = Run(mine, 19, Processes(torch.device("cpu")))
    before = {name: x.clone() for name, x in state.network.named_parameters()}
    loss = state.step(torch.randn(2, 3, 32, 64), torch.randint(19, (2, 32, 64)))
    assert loss.isfinite()
    assert state.iteration == 1
    still = {name for name, x in state.network.named_parameters() if torch.equal(x, before[name])}
    assert still == {f"head.0.attention.{part}" for part in still if "attention" in part}
    assert "head.0.attention.gamma" not in still
    assert any(isinstance(module, opponents.FusedRCCAHead) for module in state.network.modules())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_is_remembered_and_a_second_is_obeyed(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with signals() as asked:
        assert not asked.is_set()
        signal.raise_signal(number)
        assert asked.is_set()
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


def test_the_learning_rate_is_torchs_polynomial() -> None:
    mine = recipe(lr=0.07, iterations=11)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], mine.lr)
    theirs = torch.optim.lr_scheduler.PolynomialLR(optimiser, mine.iterations, power=0.9)
    for iteration in range(mine.iterations):
        assert mine.learning_rate(iteration) == pytest.approx(theirs.get_last_lr()[0])
        optimiser.step()
        theirs.step()


def test_the_loss_is_a_mean_over_pixels_that_have_a_class() -> None:
    logits = {name: torch.randn(2, 5, 4, 6, requires_grad=True) for name in ("out", "aux")}
    labels = torch.randint(5, (2, 4, 6))
    labels[0, :2] = IGNORED
    pixels = [p for p in np.ndindex(2, 4, 6) if labels[p] != IGNORED]
    out, aux = (
        -sum(y[b, :, h, w].log_softmax(0)[labels[b, h, w]] for b, h, w in pixels) / len(pixels) for y in logits.values()
    )
    assert relative_error(recipe().loss(logits, labels), out + 0.4 * aux) < 1e-6
    assert relative_error(recipe().loss({"out": logits["out"]}, labels), out) < 1e-6
    nothing = recipe().loss(logits, torch.full_like(labels, IGNORED))
    nothing.backward()
    assert nothing == 0
    assert logits["out"].grad is not None
    assert not logits["out"].grad.any()


# -- samples -----------------------------------------------------------------------------------------------------------


def samples(folder: Path, **changes: Any) -> Samples:
    mine = recipe(**changes)
    data = DATA_SETS[mine.data_set]
    return Samples(data, data.paths(folder, "train"), mine)


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
    monkeypatch.setattr(stream, "augment", lambda image, label: (image, label))
    for n in range(15):
        image, _ = stream[n]
        (number,) = [i for i, (path, _) in enumerate(stream.paths) if np.array_equal(image, load(path))]
        taken.append(number)
    epochs = [taken[i : i + 5] for i in (0, 5, 10)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def load(path: Path) -> np.ndarray:
    return np.moveaxis(np.asarray(Image.open(path)), -1, 0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_a_batch_and_go_on_where_one_was(count: int) -> None:
    mine = recipe(batch=6, iterations=4)
    shares = [list(batches(1, mine, rank, count)) for rank in range(count)]
    together = [[n for share in shares for n in share[i]] for i in range(3)]
    assert together == [list(range(6 * i, 6 * i + 6)) for i in (1, 2, 3)]


def test_labels_move_with_their_images(city: Path) -> None:
    """What is left of the image's colour says which label there must be; outside the image there is none."""
    stream = samples(city, crop=(40, 100))
    palette = torch.tensor(colours(np.arange(len(IDS)), len(IDS)))  # of the classes that occur, in the order of IDS
    classes = DATA_SETS["cityscapes"].classes[list(IDS)]
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


def test_scales_are_those_of_the_recipe(city: Path) -> None:
    stream = samples(city)
    scale = stream.augment.transforms[0]
    whole = tv_tensors.Image(torch.zeros(3, *SIZE, dtype=torch.uint8))
    sizes = torch.tensor([scale(whole).shape[1:] for _ in range(200)]) / torch.tensor(SIZE)
    assert (sizes[:, 0] - sizes[:, 1]).abs().max() < 1 / 48
    assert 0.49 < sizes.min() < 0.6
    assert 1.9 < sizes.max() < 2.01


def test_a_flip_makes_left_arms_right() -> None:
    flip = RandomFlip(DATA_SETS["lip"].mirror)
    label = tv_tensors.Mask(torch.randint(20, (1, 4, 6), dtype=torch.uint8))
    flipped = flip.transform(label, {})
    assert isinstance(flipped, tv_tensors.Mask)
    other = {14: 15, 15: 14, 16: 17, 17: 16, 18: 19, 19: 18}
    expected = [[other.get(int(c), int(c)) for c in row] for row in label[0].flip(-1)]
    assert flipped[0].tolist() == expected
    image = tv_tensors.Image(label.expand(3, -1, -1))
    assert torch.equal(flip.transform(image, {}), image.flip(-1))


# -- data sets ---------------------------------------------------------------------------------------------------------


def test_labels_mean_what_their_publishers_say() -> None:
    for c in datasets.Cityscapes.classes:
        if c.id >= 0:
            assert DATA_SETS["cityscapes"].classes[c.id] == c.train_id
    assert {name: len(data.ids) for name, data in DATA_SETS.items()} == {
        "cityscapes": 19,
        "ade20k": 150,
        "lip": 20,
        "voc": 21,
        "coco": 171,
    }
    for data in DATA_SETS.values():
        assert len(data.names) == len(data.ids)
        assert data.classes[list(data.ids)].tolist() == list(range(len(data.ids)))
        assert data.classes[IGNORED] == IGNORED
    assert DATA_SETS["ade20k"].classes[:3].tolist() == [IGNORED, 0, 1]
    assert DATA_SETS["coco"].classes[[0, 10, 11, 12, 181]].tolist() == [0, 10, IGNORED, 11, 170]


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
    folders = re.findall(r"(\w+) / ", data.layout)
    for ours, theirs in zip(("train", "val"), splits, strict=True):
        pair = tmp_path / image.format(theirs), tmp_path / label.format(theirs)
        for path in pair:
            assert path.parent.name in folders
            save(path, np.zeros((4, 6, 3) if path.suffix == ".jpg" else (4, 6), np.uint8))
        assert data.paths(tmp_path, ours) == [pair]
    pair[1].unlink()
    with pytest.raises(InputError, match=r"a\.png is not there; expected is"):
        data.paths(tmp_path, "val")


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 7, 8, 9, 50])
@pytest.mark.parametrize("window", [1, 8, 9])
def test_windows_cover_a_length_and_overlap_by_a_third(length: int, window: int) -> None:
    begins = starts(length, window)
    assert begins[0] == 0
    assert begins[-1] + window == max(length, window)
    assert all(0 < b - a <= max(1, window * 2 / 3) for a, b in pairwise(begins))


@pytest.mark.parametrize("size", [(13, 22), (8, 12), (5, 30), (3, 4)], ids=str)
def test_sliding_a_function_of_single_pixels_is_the_function(size: tuple[int, int]) -> None:
    seen = []

    def network(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[2:]))
        return torch.cat([x, x**2], 1)

    x = torch.randn(1, 3, *size, dtype=torch.float32)
    assert torch.allclose(slide(network, x, (8, 12)), torch.cat([x, x**2], 1))
    assert set(seen) == {(8, 12)}


def test_sliding_is_the_mean_over_the_windows_of_a_pixel() -> None:
    x = torch.randn(1, 1, 5, 3)
    total, count = torch.zeros(5), torch.zeros(5)
    for begin in starts(5, 3):
        total[begin : begin + 3] += torch.arange(3.0)
        count[begin : begin + 3] += 1
    y = slide(lambda x: torch.arange(3.0).view(1, 1, 3, 1).expand(1, 1, 3, 3), x, (3, 3))
    assert torch.equal(y[0, 0, :, 0], total / count)
    assert count.max() > 1


def test_probabilities_are_the_mean_over_scales_and_mirrors() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    x, mirror = torch.randn(1, 3, 9, 14), torch.tensor([0, 2, 1, 3])

    def at(x: Tensor, scale: float) -> Tensor:
        size = [round(scale * s) for s in x.shape[2:]]
        logits = conv(F.interpolate(x, size, mode="bilinear"))
        return F.interpolate(logits, x.shape[2:], mode="bilinear").softmax(1)

    parts = [at(x, 1), at(x, 2)]
    mirrored = [at(x.flip(3), s).flip(3)[:, [0, 2, 1, 3]] for s in (1, 2)]
    window = (18, 28)
    with torch.no_grad():
        assert torch.allclose(probabilities(conv, x, (9, 14)), parts[0], atol=1e-6)
        y = probabilities(lambda x: conv(x), x, window, (2.0,), mirror)
        assert torch.allclose(y, (parts[1] + mirrored[1]) / 2, atol=1e-6)
        both = probabilities(conv, F.pad(x, (0, 0)), (9, 14), (1.0,), mirror)
        assert torch.allclose(both, (parts[0] + mirrored[0]) / 2, atol=1e-6)
        assert torch.allclose(y.sum(1), torch.ones(1, 9, 14))


def test_iou_counts_pixels_of_all_images_together() -> None:
    predicted = [(torch.randint(4, s), torch.randint(3, s)) for s in ((5, 7), (3, 4), (6, 2))]
    for _, label in predicted:
        label[0, 0] = IGNORED
    ious, mean = intersection_over_union(predicted, 6, torch.device("cpu"))
    p, y = (torch.cat([pair[i].flatten() for pair in predicted]) for i in (0, 1))
    p, y = p[y != IGNORED], y[y != IGNORED]
    expected = [float(((p == c) & (y == c)).sum() / ((p == c) | (y == c)).sum()) for c in range(4)]
    assert ious[:4] == pytest.approx(expected)
    assert ious[4:] == [None, None]
    assert mean == pytest.approx(np.mean(expected))


# -- errors ------------------------------------------------------------------------------------------------------------


def mistakes() -> Iterator[tuple[list[str], str]]:
    yield [], "--data-set must be one of cityscapes, ade20k, lip, voc, coco"
    yield ["--data-set", "voc", "--channels", "40"], "--channels must be a multiple of 16, got 40"
    yield ["--data-set", "voc", "--batch", "1", "--head", "PPM"], "--batch must be at least 2"
    yield ["--data-set", "voc", "--lr", "-1"], "must be a number above 0, got '-1'"
    yield ["--data-set", "voc", "--head", "OCR"], "invalid choice: 'OCR'"
    yield ["--evaluate", "nothing.pt"], "nothing.pt must be a checkpoint that this command wrote"


def test_backbones_that_cannot_be_are_named() -> None:
    for changes, message in (
        ({"backbone": "resnet18"}, "--backbone resnet18 --weights None: name must be a network with bottlenecks"),
        ({"weights": "ours"}, "--backbone resnet50 --weights ours: 'ours'; --weights none starts from random ones"),
    ):
        mine = recipe(**changes)
        with pytest.raises(InputError, match=message):
            running.network(mine, 19, mine.weights)


@pytest.mark.parametrize(("arguments", "message"), list(mistakes()))
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data", ".", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_folder_without_data_shows_the_layout(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--data", str(tmp_path / "nowhere"), "--data-set", name])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert f"nowhere has no images of the split 'train'; expected is\n{DATA_SETS[name].layout}" in printed


def wrong_labels(folder: Path) -> Iterator[tuple[np.ndarray, str]]:
    yield np.full(SIZE, 77, np.uint8), "must hold numbers of classes, got 77"
    yield (
        np.zeros((*SIZE, 3), np.uint8),
        "must have one byte a pixel and the 80x48 pixels of a.jpg, got 80x48 of mode RGB",
    )
    yield np.zeros((4, 6), np.uint8), "got 6x4 of mode L"


@pytest.mark.parametrize("which", range(3))
def test_a_file_that_is_no_label_is_named(
    which: int, tmp_path: Path, small_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    values, message = list(wrong_labels(tmp_path))[which]
    for split in ("train", "val"):
        save(tmp_path / f"{split}_images" / "a.jpg", np.zeros((*SIZE, 3), np.uint8))
        save(tmp_path / f"{split}_segmentations" / "a.png", values)
    arguments = ["train", "--data", str(tmp_path), "--data-set", "lip", "--out", str(tmp_path), "--weights", "none"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--batch", "2", "--crop", "32", "--workers", "0"])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert f"error: {tmp_path / 'train_segmentations' / 'a.png'} must" in printed
    assert message in printed


def test_another_recipe_and_a_loss_that_is_none_leave_the_checkpoint(
    city: Path, tmp_path: Path, small_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train", "--data", str(city), "--data-set", "cityscapes", "--crop", "32", "--weights", "none"]
    common += ["--batch", "2", "--workers", "0", "--save-every", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        main([*common, "--iterations", "3", "--lr", "1e30"])
    assert re.search(r"the loss became nan in iteration \d: try a lower --lr", capsys.readouterr().err)
    iteration = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["iteration"]
    assert len(losses(tmp_path)) == 1 + iteration < 4
    with pytest.raises(SystemExit):
        main([*common, "--iterations", "3", "--lr", "0.1"])
    expected = f"{tmp_path / 'checkpoint.pt'} was trained with lr 1e+30, not 0.1: give another --out"
    assert expected in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").write_text("nothing")
    with pytest.raises(SystemExit):
        main([*common, "--iterations", "3"])
    assert "must be a checkpoint that this command wrote" in capsys.readouterr().err
