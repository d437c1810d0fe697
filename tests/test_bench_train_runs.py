"""Runs of `bench train`: interrupted ones go on as if they had not been, and checkpoints are whole.

Runs that are killed are real processes; a network of two convolutions stands for the ResNet.
"""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.records import replacing
from bench.terminal import Terminal
from bench.train import trainer
from bench.train.trainer import stop_signals
from tests import segmentation_data
from tests.small_network import small

ROOT = Path(__file__).parent.parent
ITERATIONS = 121


@pytest.fixture(scope="module")
def city(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segmentation_data.cityscapes(tmp_path_factory.mktemp("cityscapes"))


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segmentation_data.voc(tmp_path_factory.mktemp("voc"))


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "ianet", small)


def read(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def losses(out: Path) -> list[list[str]]:
    """The log without its seconds."""
    return [row[:-1] for row in read(out / "log.csv")]


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


@pytest.mark.slow
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


def test_a_signal_is_heeded_from_the_first_word_on(
    city: Path, tmp_path: Path, small_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers: list[Any] = []
    monkeypatch.setattr(Terminal, "say", lambda *said: handlers.append(signal.getsignal(signal.SIGTERM)))
    main(command(city, tmp_path, "--workers", "0", "--iterations", "1"))
    assert handlers[0] != signal.SIG_DFL


def test_a_voc_folder_trains_and_its_checkpoint_evaluates_alone(
    voc: Path, tmp_path: Path, small_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--data", str(voc), "--workers", "0", "--crop", "32x48"]
    more = ["--data-set", "voc", "--iterations", "60", "--batch", "4", "--lr", "0.05", "--dtype", "bf16"]
    main([*arguments, *more, "--out", str(tmp_path / "a"), "--weights", "none"])
    loss = [float(row[2]) for row in losses(tmp_path / "a")[1:]]
    assert np.mean(loss[-10:]) < 0.6 * loss[0]
    assert re.search(rf"iteration 60/60: loss {np.mean(loss):.4f}, .* images/s, 0:00:00 left", capsys.readouterr().out)
    evaluation = ["--evaluate", str(tmp_path / "a" / "network.pt"), "--scales", "0.75", "1.5", "--flip"]
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


def test_the_network_is_a_file_without_the_momentum(city: Path, tmp_path: Path, small_network: None) -> None:
    main(command(city, tmp_path, "--workers", "0", "--iterations", "1"))
    network, checkpoint = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("network", "checkpoint"))
    assert checkpoint.keys() - network.keys() == {"optimiser", "scaler"}
    small(19).load_state_dict(network["network"])


def test_tensorboard_is_told_of_every_iteration(
    city: Path, tmp_path: Path, small_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, float, int]] = []

    def writer(folder: str, purge_step: int) -> Any:
        assert (folder, purge_step) == (str(tmp_path), 1)
        return nullcontext(SimpleNamespace(add_scalar=lambda *scalar: told.append(scalar)))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    monkeypatch.setattr(trainer, "find_spec", lambda name: name)
    main(command(city, tmp_path, "--workers", "0", "--iterations", "2"))
    logged = [(int(i), float(rate), float(loss)) for i, rate, loss in losses(tmp_path)[1:]]
    assert told == [scalar for i, rate, loss in logged for scalar in (("loss", loss, i), ("learning rate", rate, i))]


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "checkpoint.pt"
    with replacing(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    with pytest.raises(AttributeError), replacing(path) as temporary:
        torch.save({"half": torch.zeros(9), "other": lambda: None}, temporary)  # what cannot be written
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]
    assert path.read_text() == "first"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_is_remembered_and_a_second_is_obeyed(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_signals() as asked:
        assert not asked.is_set()
        signal.raise_signal(number)
        assert asked.is_set()
        assert signal.getsignal(number) is before
    assert signal.getsignal(number) is before


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


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"\xff\xfe\x00\x01" * 30, "is not a CSV"),
        (b"3,0.1,word,0.2\n", "line 2, must hold one iteration,learning_rate,loss,seconds"),
        (b"3,0.1\n", "line 2, must hold one iteration,learning_rate,loss,seconds"),
        (None, "must have the columns iteration,learning_rate,loss,seconds, got once upon a time"),
    ],
)
def test_a_log_that_is_none_is_one_line(
    line: bytes | None, words: str, city: Path, tmp_path: Path, small_network: None, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = command(city, tmp_path, "--workers", "0")
    arguments[arguments.index("--iterations") + 1] = "1"
    main(arguments)
    log = tmp_path / "log.csv"
    header = log.read_bytes().splitlines(keepends=True)[0]
    log.write_bytes(b"once upon a time\n" if line is None else header + line)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    _, _, message = capsys.readouterr().err.strip().partition("error: ")
    assert str(log) in message
    assert words in message
    assert len(message.splitlines()) == 1
