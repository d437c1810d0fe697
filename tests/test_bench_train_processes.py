"""`torchrun -m bench train`: several processes learn what one does. They import this file, so it has little else."""

from __future__ import annotations

import os
import signal
import socket
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench.__main__ import main
from bench.terminal import Terminal
from bench.train import checking, peers, trainer
from bench.train.classes import read_classes
from bench.train.data import DataSet, own
from bench.train.recipe import InputError
from bench.train.trainer import Process, Trainer
from tests import segmentation_data
from tests.cases import relative_error
from tests.processes import fresh_processes, processes
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


def hurried(rank: int, port: int, arguments: list[str], said: Path) -> None:
    """`python -m bench` as one of two ranks, which do not wait long for each other; what it says goes to a file."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    torch.set_num_threads(1)
    peers.PATIENCE, peers.BEAT, trainer.ianet = timedelta(seconds=4), 0.3, small
    main(arguments)


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
    port, said = free_port(), [tmp_path / f"said {rank}" for rank in range(2)]
    ranks = [fresh_processes().Process(target=hurried, args=(n, port, arguments, said[n])) for n in range(2)]
    for process in ranks:
        process.start()
    try:
        deadline = time.monotonic() + 120
        while not checkpoint.exists():
            assert all(process.is_alive() for process in ranks), [path.read_text() for path in said]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert ranks[victim].pid is not None
        os.kill(ranks[victim].pid, sent)
        left = ranks[1 - victim]
        left.join(60)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    lines = said[1 - victim].read_text().strip().splitlines()
    assert left.exitcode == 2, lines
    assert f"error: rank {victim} of 2 has died or does not move, rank {1 - victim} waited for it: " in lines[-1]
    assert not any("Traceback" in line for line in lines)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])
