"""`bench train --data-set folder`: data of one's own is checked, every fault is named, and it trains."""

from __future__ import annotations

import csv
import json
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from bench.__main__ import main
from bench.terminal import Bar, Terminal
from bench.train import trainer
from bench.train.classes import Classes, read_classes
from bench.train.data import OWN, DataSet, Samples, own
from bench.train.recipe import IGNORED, InputError
from bench.train.saved import read_checkpoint
from tests import segmentation_data
from tests.segmentation_data import SIZE, mask, save
from tests.small_network import small

H, W = SIZE


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "ianet", small)


def samples(data: DataSet, folder: Path, split: str = "train") -> list[tuple[Tensor, Tensor]]:
    """The images and labels of a split."""
    found = Samples(data, data.paths(folder, split))
    return [found[n] for n in range(len(found))]


def command(folder: Path, *more: str) -> list[str]:
    return ["train", "--data", str(folder), "--data-set", "folder", *more]


def checked(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[list[Any], str]:
    """The rows of the tables that --check shows, and the line behind them."""
    arguments = command(folder, "--check", "--format", "json", "--out", str(folder / "out"), *more)
    capsys.readouterr()
    with suppress(SystemExit):
        main(arguments)
    assert not (folder / "out").exists()
    out, err = capsys.readouterr()
    said = err.strip().partition("error: ")[2] or err.strip()
    assert "Traceback" not in said
    return [table["rows"] for table in json.loads(out)], said


def test_the_table_counts_images_sizes_and_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    segmentation_data.own(tmp_path)
    save(tmp_path / "images/train/sub/small.PNG", np.zeros((4, 6, 3), np.uint8))
    (tmp_path / "labels/train/sub").mkdir()
    mask(np.array([[0, 0, 0, 0, 1, 3]]).repeat(4, 0), "colours").save(tmp_path / "labels/train/sub/small.bmp")
    for hidden in (".DS_Store", "._scene 0.png"):
        (tmp_path / "images/train" / hidden).touch()
    (tmp_path / "labels/train/notes.md").touch()
    (splits, classes), said = checked(tmp_path, capsys)
    assert [(row["split"], row["images"], row["smallest"], row["largest"], row["sizes"]) for row in splits] == [
        ("train", 6, "6x4", f"{W}x{H}", 2),
        ("val", 2, f"{W}x{H}", f"{W}x{H}", 1),
    ]
    assert splits[0]["pixels of labels"] == 5 * H * W + 24
    data = own(read_classes(tmp_path))
    for split in ("train", "val"):
        labels = [label.numpy() for _, label in samples(data, tmp_path, split)]
        for row, number in zip(classes, (0, 1, 2, IGNORED, 254), strict=True):
            pixels, holders = (sum(f(label == number) for label in labels) for f in (np.sum, np.any))
            assert (row[f"{split} pixels"], row[f"{split} images"]) == (pixels, holders)
            assert float(row[f"{split} %"]) == pytest.approx(100 * pixels / sum(x.size for x in labels), abs=0.006)
    assert [(row["class"], row["colour"]) for row in classes][:4] == [
        ("road", "128 64 128"),
        ("wall", "70 70 70"),
        ("open water", "0 130 180"),
        ("ignored", "0 0 0"),
    ]
    assert said == (
        "1 files end otherwise and are left out: labels/train/notes.md\n8 pairs of images and labels are in order."
    )


def test_every_fault_is_in_the_table_with_the_first_files_that_have_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = segmentation_data.own(tmp_path, kinds=("names",), ends=("png",), counts=(9, 1), listed="names")
    for i, row, value in ((1, -1, 77), (3, -1, 77), (4, -1, 77), (7, -1, 77), (3, -2, 200)):
        path = folder / f"labels/train/scene {i}.png"
        values = np.array(Image.open(path))
        values[row, :i] = value
        save(path, values)
    (folder / "images/train/scene 0.png").unlink()
    (folder / "labels/train/scene 2.png").unlink()
    path = folder / "images/train/scene 5.png"
    path.write_bytes(path.read_bytes()[:-40])
    save(folder / "labels/train/scene 6.png", np.zeros((W, H), np.uint8))
    save(folder / "labels/train/scene 8.png", np.zeros((*SIZE, 3), np.uint8))
    path = folder / "labels/val/scene 0.png"
    content = path.read_bytes()
    path.write_bytes(content[:60] + bytes(8) + content[68:])  # damage amid a file, which headers do not show
    (splits, classes, faults), said = checked(folder, capsys)
    found = {row["what a file does"]: (row["files"], row["pixels"], row["the first of them"]) for row in faults}
    label = "labels/train/scene {}.png".format
    unknown, damaged = "holds the unknown value 77", [what for what in found if what.startswith("cannot be read")]
    assert found.pop(unknown) == (4, 1 + 3 + 4 + 7, ", ".join(map(label, (1, 3, 4))))
    assert found.pop("holds the unknown value 200") == (1, 3, label(3))
    assert found.pop("has no image of its name") == (1, None, label(0))
    assert found.pop("has no label of its name") == (1, None, "images/train/scene 2.png")
    wanted = f"must have one number a pixel and the {W}x{H} pixels of scene"
    assert found.pop(f"{wanted} 6.png, got {H}x{W} of mode L") == (1, None, label(6))
    hint = "for such labels list the classes by colours, as `road 128 64 128`"
    assert found.pop(f"{wanted} 8.png, got {W}x{H} of mode RGB; {hint}") == (1, None, label(8))
    assert {found.pop(what)[2] for what in damaged} == {"images/train/scene 5.png", "labels/val/scene 0.png"}
    assert not found
    first = folder / "images/train/scene 2.png"
    assert said == f"{first} has no label of its name; the table names what is wrong with 10 files"
    assert splits[0]["unknown"] == classes[-1]["train pixels"] == 1 + 3 + 4 + 7 + 3
    assert classes[-1]["train images"] == 4


def test_training_checks_first_and_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(trainer, "Trainer")  # for nothing is trained
    begun: list[Any] = []
    done: list[Any] = []
    progress = Terminal.progress

    def noted(said: Terminal, *args: Any) -> AbstractContextManager[Bar]:
        begun.append(args)
        return progress(said, *args)

    monkeypatch.setattr(Terminal, "progress", noted)
    monkeypatch.setattr(Bar, "advance", lambda *args: done.append(args))
    folder = segmentation_data.own(tmp_path)
    path = folder / "labels/train/scene 1.png"
    mask(np.full(SIZE, 3), "names").save(path)  # 255, grey
    with pytest.raises(SystemExit):
        main(command(folder, "--out", str(tmp_path / "out")))
    out, err = capsys.readouterr()
    assert begun == [("pairs", 7)]
    assert len(done) == 7
    assert "Pixels of every class" in out
    expected = f"error: {path} holds the unknown colour 255 255 255: list it as a class, or as `ignore`"
    assert err.rstrip().endswith(expected)


def test_a_lossy_label_is_refused_in_words_unless_every_value_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = segmentation_data.own(tmp_path, kinds=("colours",), counts=(2, 1))
    path = folder / "labels/train/scene 0.png"
    with Image.open(path) as picture:
        picture.save(path.with_suffix(".jpg"))
    path.unlink()
    tables, said = checked(folder, capsys)
    assert said == f"{path.with_suffix('.jpg')} holds more than 16 unknown colours; JPEG is lossy: store labels as PNG"
    assert len(tables[2]) == 1
    (folder / "classes.txt").write_text("nothing 0\nthing 255\n")
    for split in ("train", "val"):
        for label in (folder / "labels" / split).iterdir():
            label.unlink()
            Image.fromarray(np.full(SIZE, 255, np.uint8)).save(label.with_suffix(".jpg"))
    _, said = checked(folder, capsys)
    assert said.endswith("3 pairs of images and labels are in order.")


def test_what_no_training_image_has_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = segmentation_data.own(tmp_path)
    with (folder / "classes.txt").open("a") as file:
        file.write("sky 9 9 9\n")
    assert "No image to train on has sky: what is not shown cannot be learned.\n" in checked(folder, capsys)[1]


def test_most_kinds_of_faults_wait_for_verbose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = segmentation_data.own(tmp_path, kinds=("names",), counts=(3, 1), listed="names")
    for i in range(3):
        values = np.arange(10 + 16 * i, 26 + 16 * i, dtype=np.uint8).repeat(H * W // 16)
        save(folder / f"labels/train/scene {i}.png", values.reshape(SIZE))
    assert [len(checked(folder, capsys, *more)[0][2]) for more in ((), ("--verbose",))] == [20, 48]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("end", ["jpg", "png", "tif", "webp"])
def test_images_are_as_exif_turns_them(end: str, orientation: int, tmp_path: Path) -> None:
    """A label drawn on what a tool shows fits the image that is loaded, pixel by pixel."""
    segmentation_data.own(tmp_path, counts=(1, 1))
    path = tmp_path / "images/train/scene 0.png"
    with Image.open(path) as picture:
        back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # what EXIF's turn undoes
        stored = picture if back is None else picture.transpose(Image.Transpose(back))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        exact: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
        stored.save(path.with_suffix(f".{end}"), exif=exif, **exact.get(end, {}))
        shown = np.asarray(picture).astype(int)
    if end != "png":
        path.unlink()
    data = own(read_classes(tmp_path))
    paths = data.paths(tmp_path, "train")
    image, label = Samples(data, paths)[0]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    loaded = (255 * (image * std + mean)).round().permute(1, 2, 0).numpy()
    assert loaded.shape[:2] == label.shape == SIZE
    assert np.abs(loaded - shown).max() < (12 if end == "jpg" else 1)
    if orientation > 4:
        Image.fromarray(np.zeros((W, H, 3), np.uint8)).save(paths[0][1])  # drawn on what is stored
        with pytest.raises(InputError, match="got 48x80 of mode RGB") as raised:
            data.paths(tmp_path, "train")
        assert ("; EXIF turns that image when it is shown: turn the label too" in str(raised.value)) == (end != "tif")


def test_images_of_16_bits_alpha_and_grey_are_read(tmp_path: Path) -> None:
    folder = segmentation_data.own(tmp_path, counts=(3, 1), ends=("png",))
    grey = np.arange(H * W).reshape(SIZE) * 17 % 65536
    pictures = [
        Image.fromarray(grey.astype(np.uint16)),
        Image.fromarray((grey >> 8).astype(np.uint8)),
        Image.fromarray(np.dstack([(grey >> 8).astype(np.uint8)] * 3 + [np.zeros(SIZE, np.uint8)])),
    ]
    for i, picture in enumerate(pictures):
        picture.save(folder / f"images/train/scene {i}.png")
    data = own(read_classes(folder))
    first, second, third = (image for image, _ in samples(data, folder))
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    Image.fromarray(grey.astype(np.float32)).save(folder / "images/train/scene 0.tif")
    (folder / "images/train/scene 0.png").unlink()
    with pytest.raises(InputError, match=r"scene 0\.tif must be an image of 8 or 16 bits a channel, got one of mode F"):
        data.paths(folder, "train")


def test_it_trains_goes_on_and_evaluates_by_the_classes_in_the_checkpoint(
    tmp_path: Path, small_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = segmentation_data.own(tmp_path / "data"), tmp_path / "out"
    arguments = command(
        folder, "--workers", "0", "--crop", "32x48", "--batch", "4", "--lr", "0.05", "--iterations", "60"
    )
    arguments += ["--weights", "none"]
    main([*arguments, "--out", str(out)])
    with (out / "log.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert np.mean(losses[-5:]) < 0.8 * losses[0]
    printed = capsys.readouterr().out
    assert "open water" in printed
    network = torch.load(out / "network.pt", weights_only=True)["recipe"]["classes"]
    assert Classes(**network) == read_classes(folder)
    with (out / "iou.csv").open(newline="") as file:
        assert [row[0] for row in csv.reader(file)] == ["class", "road", "wall", "open water", "mean"]
    evaluate = ["train", "--data", str(folder), "--evaluate", str(out / "network.pt"), "--workers", "0", "--out"]
    main([*evaluate, str(tmp_path / "again")])
    assert (tmp_path / "again" / "iou.csv").read_text() == (out / "iou.csv").read_text()
    (folder / "classes.txt").write_text("wall 70 70 70\nroad 128 64 128\nopen water 0 130 180\nignore 0 0 0\n")
    capsys.readouterr()
    for command_ in ([*arguments, "--out", str(out)], [*evaluate, str(tmp_path / "again")]):
        with pytest.raises(SystemExit):
            main(command_)
        said = capsys.readouterr().err.partition("error: ")[2].strip()
        assert "road 128 64 128, wall 70 70 70, open water 0 130 180, ignore 0 0 0" in said
        assert "wall 70 70 70, road 128 64 128, open water 0 130 180, ignore 0 0 0" in said
        assert "\n" not in said


def test_checkpoints_from_before_they_said_their_classes_are_read(tmp_path: Path, small_network: None) -> None:
    city = segmentation_data.cityscapes(tmp_path / "city")
    more = ["--iterations", "1", "--crop", "32", "--batch", "2", "--workers", "0", "--weights", "none"]
    main(["train", "--data", str(city), "--data-set", "cityscapes", *more, "--out", str(tmp_path)])
    network = torch.load(tmp_path / "network.pt", weights_only=True)
    classes = network["recipe"].pop("classes")
    torch.save(network, tmp_path / "old.pt")
    read = read_checkpoint(tmp_path / "old.pt", torch.device("cpu"))
    assert read["recipe"].classes == Classes(**classes)
    assert read["recipe"].classes.colours[0] == (128, 64, 128)


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = segmentation_data.own(tmp_path / "a", counts=(1, 1))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "classes.txt").write_text("road\nwall\n")
    (folder / "images/val/scene 0.tif").touch()
    for arguments, message in (
        ([str(tmp_path / "c"), "--data-set", "folder"], f"{tmp_path / 'c'} must have a class list"),
        ([str(tmp_path / "b"), "--data-set", "folder"], "b has no images of the split 'train'; expected is"),
        ([str(folder), "--data-set", "folder"], "scene 0.png must be the one picture of its name, and there is"),
        ([str(folder), "--evaluate", "x.pt", "--check"], "--check must come with --data-set"),
    ):
        with pytest.raises(SystemExit):
            main(["train", "--data", *arguments])
        assert message in capsys.readouterr().err


def test_published_data_sets_are_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    city = segmentation_data.cityscapes(tmp_path)
    main(["train", "--data", str(city), "--data-set", "cityscapes", "--check", "--format", "json"])
    splits, classes = (table["rows"] for table in json.loads(capsys.readouterr().out))
    assert [row["images"] for row in splits] == [5, 2]
    assert sum(row["train pixels"] for row in classes) == 5 * H * W


def test_the_endings_of_the_issue_are_read() -> None:
    assert {".png", ".jpg", ".tif", ".webp", ".bmp"} <= set(OWN)
