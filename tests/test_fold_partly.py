"""`fuse` folds what is exactly ours, leaves all else as it is and exact, and says what it left."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from isa_triton import InterlacedSparseSelfAttention, ISAHead, ISAModule, SelfAttention2d
from isa_triton.inference import FoldedAttention, fuse
from tests.cases import relative_error, with_random_statistics


class Scaled(SelfAttention2d):
    """A stage that does something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class ScaledISA(InterlacedSparseSelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * super().forward(x)


class Adapter(nn.Module):
    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base, self.delta = base, nn.Conv2d(base.in_channels, base.out_channels, 1)
        self.in_channels, self.out_channels, self.weight = base.in_channels, base.out_channels, base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.delta(x)


def head(**options: Any) -> Any:
    return ISAHead(6, 5, 3, key_channels=4, partition_size=(2, 3), **options)


def with_adapter(network: Any, name: str) -> nn.Module:
    parent, _, part = name.rpartition(".")
    setattr(network.get_submodule(parent), part, Adapter(network.get_submodule(name)))
    return network


def with_hook(network: Any, name: str) -> nn.Module:
    network.get_submodule(name).register_forward_hook(lambda module, args, y: 0.5 * y)
    return network


def parametrised(network: Any, name: str) -> nn.Module:
    parametrizations.weight_norm(network.get_submodule(name))
    return network


STAGE = "isa.branches.0.long_range"
NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {  # and what is named as left
    "group norm": (lambda: head(norm_layer=partial(nn.GroupNorm, 1)), "GroupNorm is no plain batch normalisation"),
    "statistics of the batch": (
        lambda: head(norm_layer=partial(nn.BatchNorm2d, track_running_stats=False)),
        "BatchNorm2d is no plain batch normalisation with running statistics",
    ),
    "subclass of a stage": (lambda: nn.Sequential(Scaled(6, 4, 5, pattern="local"), head()), "a Scaled in place of"),
    "subclass of ISA": (lambda: nn.Sequential(ScaledISA(6, 4, 5), head()), "a ScaledISA in place of"),
    "adapter of values": (lambda: with_adapter(head(), f"{STAGE}.value"), "isa.branches.0 (a Adapter in place"),
    "adapter of a query": (lambda: with_adapter(head(), f"{STAGE}.query.1.conv"), "isa.branches.0 (a Adapter in place"),
    "adapter of the 3x3": (lambda: with_adapter(head(), "reduce.conv"), "reduce (a Adapter in place"),
    "weight norm of the 3x3": (lambda: parametrised(head(), "reduce.conv"), "reduce (a ParametrizedConv2d in place"),
    "weight norm of values": (lambda: parametrised(head(), f"{STAGE}.value"), "a ParametrizedConv1x1 in place"),
    "hook of a stage": (lambda: with_hook(head(), STAGE), "hooks of a SelfAttention2d"),
    "hook of values": (lambda: with_hook(head(), f"{STAGE}.value"), "hooks of a Conv1x1"),
    "hook of a norm": (lambda: with_hook(head(), f"{STAGE}.output.norm"), "is no plain batch normalisation"),
    "hook of ISA": (lambda: with_hook(head(), "isa.branches.0"), "hooks of a InterlacedSparseSelfAttention"),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_a_network_that_folds_in_part_is_the_same_function(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, left = NETWORKS[name]
    network = with_random_statistics(make()).eval()
    with caplog.at_level(logging.INFO, logger="isa_triton.inference"):
        folded = fuse(network)
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64)
    assert relative_error(folded(x), network(x)) < 1e-12
    assert left in caplog.text
    assert relative_error(fuse(folded)(x), network(x)) < 1e-12


@torch.no_grad()
def test_the_rest_of_a_network_is_folded() -> None:
    network = nn.Sequential(Scaled(6, 4, 5, pattern="local"), ISAModule(6, 4, 5, 6))
    folded: Any = fuse(with_random_statistics(network).eval())
    assert isinstance(folded[0], Scaled)
    assert isinstance(folded[0].output.norm, nn.BatchNorm2d)
    assert isinstance(folded[1].branches[0], FoldedAttention)
    assert isinstance(folded[1].fuse.norm, nn.Identity)


@torch.no_grad()
def test_folding_again_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    once = fuse(with_random_statistics(head()).eval())
    with caplog.at_level(logging.INFO, logger="isa_triton.inference"):
        twice = fuse(once)
    assert caplog.text == ""
    assert twice.state_dict().keys() == once.state_dict().keys()
    assert all(torch.equal(x, once.state_dict()[name]) for name, x in twice.state_dict().items())
