"""What a recipe of `bench train` says: the learning rate, the loss, the network, and who takes which samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.compared import modules
from bench.train import trainer
from bench.train.data import batches
from bench.train.recipe import IGNORED, InputError
from bench.train.saved import read_checkpoint
from bench.train.trainer import Process, Trainer, build
from tests.cases import relative_error
from tests.small_network import recipe, small


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


def test_a_step_teaches_every_part_of_the_network() -> None:
    mine = recipe(head="RCCA", output_stride=32)
    state = Trainer(mine, Process(torch.device("cpu")))
    before = {name: x.clone() for name, x in state.network.named_parameters()}
    loss = state.step(torch.randn(2, 3, 32, 64), torch.randint(19, (2, 32, 64)))
    assert loss.isfinite()
    assert state.iteration == 1
    still = {name for name, x in state.network.named_parameters() if torch.equal(x, before[name])}
    assert still == {f"head.0.attention.{part}" for part in still if "attention" in part}
    assert "head.0.attention.gamma" not in still
    assert any(isinstance(module, modules.PartitionedRCCAHead) for module in state.network.modules())


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_a_batch_and_go_on_where_one_was(count: int) -> None:
    mine = recipe(batch=6, iterations=4)
    shares = [list(batches(1, mine, rank, count)) for rank in range(count)]
    together = [[n for share in shares for n in share[i]] for i in range(3)]
    assert together == [list(range(6 * i, 6 * i + 6)) for i in (1, 2, 3)]


def test_backbones_that_cannot_be_are_named() -> None:
    for changes, message in (
        ({"backbone": "resnet18"}, "--backbone resnet18 --weights None: name must be a network with bottlenecks"),
        (
            {"weights": "ours"},
            "--weights ours: torchvision has no weights of this name for it: IMAGENET1K_V1, IMAGENET1K_V2;",
        ),
    ):
        mine = recipe(**changes)
        with pytest.raises(InputError, match=message):
            build(mine, mine.weights)


@pytest.fixture
def small_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "ianet", small)


def test_every_process_and_iteration_has_dice_of_its_own(small_network: None) -> None:
    seeds = []
    for rank in (0, 1, 2):
        training = Trainer(recipe(), Process(torch.device("cpu"), rank))
        for _ in range(2):
            training.step(torch.randn(2, 3, 32, 64), torch.randint(19, (2, 32, 64)))
            seeds.append(torch.initial_seed())
    assert len(set(seeds)) == 6


def test_a_run_that_goes_on_has_the_loss_scale_that_it_had(small_network: None, tmp_path: Path) -> None:
    training = Trainer(recipe(dtype="float16"), Process(torch.device("cpu")))
    training.scaler.scale(torch.ones(1))  # which makes it
    training.scaler.update(2.0**7)
    training.save(tmp_path / "checkpoint.pt")
    saved = read_checkpoint(tmp_path / "checkpoint.pt", torch.device("cpu"))
    assert Trainer(training.recipe, training.process, saved).scaler.get_scale() == 2.0**7
