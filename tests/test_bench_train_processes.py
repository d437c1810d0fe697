"""`torchrun -m bench train`: several processes learn what one does. They import this file, so it has little else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench.terminal import Terminal
from bench.train import checking, trainer
from bench.train.classes import read_classes
from bench.train.data import DataSet, own
from bench.train.recipe import InputError
from bench.train.trainer import Process, Trainer
from tests import segmentation_data
from tests.cases import relative_error
from tests.processes import processes
from tests.small_network import recipe, small

SIZE = 48, 80


def two_steps() -> dict[str, Tensor]:
    """A network after two steps of the processes that there are, on their shares of the same batches."""
    trainer.ianet = lambda num_classes, **_: small(num_classes, dropout=0.0)
    joined = dist.is_initialized()
    rank, count = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    training = Trainer(recipe(batch=4), Process(torch.device("cpu"), rank, count))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        images = torch.randn(4, 3, *SIZE, generator=generator)
        labels = torch.randint(19, (4, *SIZE), generator=generator)
        training.step(*(x.chunk(count)[rank] for x in (images, labels)))
    return dict(training.network.state_dict())


def checked(folder: Path) -> tuple[str, list[Any], int]:
    """What a check of three pairs says, its tables, and how many pairs this process has looked at."""
    looked = []
    original = checking.look_at

    def noted(data: DataSet, pair: tuple[Path, Path]) -> checking.Seen:
        looked.append(pair)
        return original(data, pair)

    checking.look_at = noted
    rank, count = dist.get_rank(), dist.get_world_size()
    tables: list[Any] = []
    Terminal.show = lambda said, *shown: tables.extend(table.as_dict() for table in shown)  # type: ignore[method-assign]
    process = Process(torch.device("cpu"), rank, count)
    try:
        checking.check(own(read_classes(folder)), folder, process, Terminal(quiet=True))
    except InputError as error:
        return str(error), tables, len(looked)
    return "", tables, len(looked)


@pytest.mark.slow
def test_two_processes_share_a_check_and_hear_of_the_same_faults(tmp_path: Path) -> None:
    folder = segmentation_data.own(tmp_path / "data", counts=(2, 1))
    path = folder / "labels/train/scene 1.png"
    path.write_bytes(path.read_bytes()[:-30])
    (error, tables, first), (other, same, second) = processes(2, partial(checked, folder), tmp_path)
    assert error == other
    assert error.startswith(f"{path} cannot be read: ")
    assert tables == same
    assert [row["images"] for row in tables[0]["rows"]] == [2, 1]
    assert (first, second) == (2, 1)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "ianet", small)
    first, second = processes(2, two_steps, tmp_path)
    alone = two_steps()
    start = small(19).state_dict()
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name]), name
        assert relative_error(first[name].double(), tensor.double()) < 1e-4, name
        assert not torch.equal(tensor, start[name])


HURRIED = """
import sys
from datetime import timedelta
from bench.__main__ import main
from bench.train import peers, trainer
from tests.small_network import small
peers.PATIENCE, peers.BEAT, trainer.ianet = timedelta(seconds=4), 0.3, small
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_who_is_left_names_the_rank_that_is_dead_or_stopped(victim: int, sent: signal.Signals, tmp_path: Path) -> None:
    folder, checkpoint = segmentation_data.cityscapes(tmp_path / "data"), tmp_path / "checkpoint.pt"
    arguments = [
        "train",
        "--data",
        str(folder),
        "--data-set",
        "cityscapes",
        "--out",
        str(tmp_path),
        "--weights",
        "none",
    ]
    arguments += ["--crop", "32x64", "--batch", "2", "--iterations", "100000", "--save-every", "1", "--workers", "0"]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", HURRIED, *arguments],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, **address, "RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists():
            assert all(process.poll() is None for process in ranks), [process.communicate() for process in ranks]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks[victim].send_signal(sent)
        left = ranks[1 - victim]
        _, said = left.communicate(timeout=60)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    last = said.strip().splitlines()[-1]
    assert left.returncode == 2, said
    assert f"error: rank {victim} of 2 has died or does not move, rank {1 - victim} waited for it: " in last
    assert "Traceback" not in said


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
