"""`torchrun -m bench train`: several processes learn what one does. They import this file, so it has little else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench.train import trainer
from bench.train.trainer import Process, Trainer
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
