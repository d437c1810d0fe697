"""Checkpoints: what was written is read, what is damaged is refused in a line, the old one survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench.__main__ import main
from bench.records import replacing
from bench.train import saved
from bench.train.recipe import InputError
from bench.train.saved import read_checkpoint, restore, write_checkpoint
from tests.small_network import recipe

CPU = torch.device("cpu")
NETWORK = {"weight": torch.arange(600.0).view(20, 30), "count": torch.tensor(3)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "checkpoint.pt", recipe(), 7, {"network": NETWORK})
    return tmp_path / "checkpoint.pt"


def is_whole(path: Path) -> bool:
    """Whether a file reads as what was written; not, if it is refused. Anything else fails."""
    try:
        checkpoint = read_checkpoint(path, CPU)
    except InputError as refusal:
        if str(path) in (words := str(refusal)) and len(words.splitlines()) == 1:
            return False
        raise
    network: dict[str, Tensor] = checkpoint["network"]
    assert network.keys() == NETWORK.keys()
    assert all(torch.equal(network[name], NETWORK[name]) for name in NETWORK)
    assert (checkpoint["recipe"], checkpoint["iteration"]) == (recipe(), 7)
    return True


def test_what_was_written_is_read(path: Path) -> None:
    assert is_whole(path)


def test_no_damage_is_read_as_other_weights(path: Path) -> None:
    """300 bits, 100 blocks of zeros, 200 truncations: refused, or in a place that says nothing about the run."""
    bytes_, draw = path.read_bytes(), np.random.default_rng(0)
    read = {"bits": 0, "blocks": 0, "truncations": 0}
    for _ in range(300):
        damaged = bytearray(bytes_)
        damaged[draw.integers(len(bytes_))] ^= 1 << draw.integers(8)
        path.write_bytes(damaged)
        read["bits"] += is_whole(path)
    for _ in range(100):
        at = draw.integers(len(bytes_) - 64)
        path.write_bytes(bytes_[:at] + bytes(64) + bytes_[at + 64 :])
        read["blocks"] += is_whole(path)
    for _ in range(200):
        path.write_bytes(bytes_[: draw.integers(len(bytes_))])
        read["truncations"] += is_whole(path)
    assert read["truncations"] == 0
    assert read["bits"] < 150  # padding between records


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"network": None}, "it has no 'network'"),
        ({"recipe": None}, "it has no 'recipe'"),
        ({"iteration": -1}, "its iteration is -1"),
        ({"iteration": "7"}, "its iteration is '7'"),
        ({"recipe": {"head": "OCR"}}, "its head is 'OCR', none of "),
        ({"recipe": {"data_set": "mine", "head": "ISA"}}, "its data set is 'mine', none of "),
        ({"recipe": {"data_set": "voc", "head": "ISA", "depth": 3}}, "unexpected keyword argument 'depth'"),
        ({"recipe": 3}, "is not subscriptable"),
    ],
)
def test_what_is_no_checkpoint_is_refused_with_the_reason(path: Path, changes: dict[str, Any], words: str) -> None:
    contents = torch.load(path, weights_only=True) | changes
    torch.save({name: value for name, value in contents.items() if value is not None}, path)
    with pytest.raises(InputError, match=words) as refused:
        read_checkpoint(path, CPU)
    assert f"{path} must be a checkpoint that this command wrote" in str(refused.value)


@pytest.mark.parametrize("contents", [b"", b"nothing", bytes(5000), b"PK\x03\x04" + bytes(100)])
def test_garbage_is_refused(path: Path, contents: bytes) -> None:
    path.write_bytes(contents)
    assert not is_whole(path)
    path.unlink()
    assert not is_whole(path)


def test_parts_of_another_network_are_refused(path: Path) -> None:
    checkpoint = read_checkpoint(path, CPU)
    with pytest.raises(InputError, match=r"checkpoint\.pt, network, must be that of its recipe: Missing key"):
        restore(nn.Conv2d(3, 4, 1), checkpoint, "network")
    linear = nn.Linear(3, 4)
    with pytest.raises(InputError, match=r"must be that of its recipe: size mismatch for weight"):
        restore(linear, checkpoint | {"network": {"weight": torch.ones(2, 2), "bias": torch.ones(4)}}, "network")
    with pytest.raises(InputError, match=r"checkpoint\.pt has no optimiser: network\.pt is for evaluation"):
        restore(linear, checkpoint, "optimiser")


def test_a_full_disk_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(contents: Any, temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 576 vs 470")

    monkeypatch.setattr(saved.torch, "save", full)
    with pytest.raises(
        InputError, match=r"cannot be written: not all of it was written, \d+ MB are free; what was there"
    ):
        write_checkpoint(path, recipe(), 8, {"network": {}})
    assert is_whole(path)
    assert os.listdir(path.parent) == [path.name]


def test_what_killed_processes_left_is_removed(path: Path) -> None:
    """Ten processes that are killed while they write: no file of theirs stays, and the checkpoint is whole."""
    write = (
        "import os, sys; from pathlib import Path; from bench.records import replacing\n"
        "for _ in range(10):\n"
        "    if not os.fork():\n"
        "        with replacing(Path(sys.argv[1])) as temporary:\n"
        "            temporary.write_text('half'); print('writing', flush=True); os.kill(os.getpid(), 9)\n"
        "    os.wait()\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); print('writing', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", write, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(11)] == ["writing\n"] * 11
    with replacing(path.with_name("other")) as temporary:
        temporary.write_text("other")
    assert [left.suffix for left in path.parent.glob(".checkpoint.pt.*")] == [
        f".{process.pid}"
    ]  # which is being written
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert is_whole(path)
    write_checkpoint(path, recipe(), 7, {"network": NETWORK})
    assert sorted(os.listdir(path.parent)) == ["checkpoint.pt", "other"]


def test_no_weight_decay_is_a_choice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--data", "nowhere", "--data-set", "voc", "--weight-decay", "0"])
    assert "nowhere" in capsys.readouterr().err
