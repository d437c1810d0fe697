"""The command line of `bench train` names what is wrong: arguments, folders, files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.__main__ import main
from bench.train import trainer
from bench.train.data import DATA_SETS
from tests import segmentation_data
from tests.segmentation_data import SIZE, save
from tests.small_network import small


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "ianet", small)


def mistakes() -> Iterator[tuple[list[str], str]]:
    yield [], "one of the arguments --data-set --evaluate is required"
    yield ["--data-set", "voc", "--evaluate", "network.pt"], "not allowed with argument"
    yield ["--data-set", "voc", "--channels", "40"], "--channels must be a multiple of 16, got 40"
    yield ["--data-set", "voc", "--batch", "1", "--head", "PPM"], "--batch must be at least 2"
    yield ["--data-set", "voc", "--lr", "-1"], "must be a number above 0, got '-1'"
    yield ["--data-set", "voc", "--head", "OCR"], "invalid choice: 'OCR'"
    yield ["--evaluate", "nothing.pt"], "nothing.pt must be a checkpoint that this command wrote"


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
    layout = "\n".join(f"  DIR/{pattern}" for pattern in DATA_SETS[name].layout("train"))
    assert f"nowhere has no images of the split 'train'; expected is\n{layout}\n" in printed


def wrong_labels() -> Iterator[tuple[np.ndarray, str]]:
    yield np.full(SIZE, 77, np.uint8), "must hold numbers of classes, got 77"
    yield (
        np.zeros((*SIZE, 3), np.uint8),
        "must have one number a pixel and the 80x48 pixels of a.jpg, got 80x48 of mode RGB",
    )
    yield np.zeros((4, 6), np.uint8), "got 6x4 of mode L"


@pytest.mark.parametrize(("which", "workers"), [(0, 0), (1, 0), (2, 0), (0, 1)])
def test_a_file_that_is_no_label_is_named_whoever_loads_it(
    which: int, workers: int, tmp_path: Path, small_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    values, message = list(wrong_labels())[which]
    for split in ("train", "val"):
        save(tmp_path / f"{split}_images" / "a.jpg", np.zeros((*SIZE, 3), np.uint8))
        save(tmp_path / f"{split}_segmentations" / "a.png", values)
    arguments = ["train", "--data", str(tmp_path), "--data-set", "lip", "--out", str(tmp_path), "--weights", "none"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--batch", "2", "--crop", "32", "--workers", str(workers)])
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert f"error: {tmp_path / 'train_segmentations' / 'a.png'} must" in printed
    assert message in printed


def stopped_training(folder: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a training on LIP says when it cannot go on."""
    arguments = ["train", "--data", str(folder), "--data-set", "lip", "--out", str(folder), "--weights", "none"]
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--batch", "2", "--crop", "32", "--workers", str(workers)])
    assert stopped.value.code == 2
    usage, _, message = capsys.readouterr().err.strip().partition("error: ")
    assert usage.startswith("usage: ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", ["train_images/a.jpg", "train_segmentations/a.png", "val_images/a.jpg"])
@pytest.mark.parametrize("lost", [900, 10**9])
def test_a_truncated_file_is_named_before_training(
    name: str, lost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(trainer, "Trainer")  # for nothing is trained
    path = segmentation_data.lip(tmp_path) / name
    content = path.read_bytes()
    path.write_bytes(content[: max(20, len(content) - lost)])
    said = stopped_training(tmp_path, 0, capsys)
    assert said.startswith(f"{path} cannot be read: ")


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_amid_a_file_is_named_by_whoever_loads_it(
    workers: int, tmp_path: Path, small_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = segmentation_data.lip(tmp_path) / "train_segmentations" / "a.png"
    content = path.read_bytes()
    path.write_bytes(content[:500] + bytes(500) + content[1000:])
    assert stopped_training(tmp_path, workers, capsys).startswith(f"{path} cannot be read: ")
