"""The usual loop, compiled: steps in autocast and in fp32, over maps that the partition size does not divide."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering

from isa_triton import ISAModule
from tests.cases import relative_error


class Lowered(Exception):
    """Inductor has laid out a graph, and would generate code."""


def network(padding: str) -> nn.Sequential:
    torch.manual_seed(0)
    isa = ISAModule(8, 3, 5, 6, partition_size=(3, 2), padding=padding, dropout=0.0)
    return nn.Sequential(nn.Conv2d(3, 8, 7, stride=4, padding=3), isa, nn.Conv2d(6, 5, 1))


@pytest.mark.slow  # half a minute
@pytest.mark.parametrize("padding", ["zeros", "mask"])
@pytest.mark.parametrize("autocast", [False, True])
def test_inductor_lays_out_a_training_step_of_any_size(padding: str, autocast: bool) -> None:
    compiled = torch.compile(network(padding), dynamic=True)
    with (
        patch.object(GraphLowering, "compile_to_module", side_effect=Lowered),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(InductorError, match="Lowered"),
    ):
        compiled(torch.randn(2, 3, 41, 27))


def gradients(module: nn.Module, x: Tensor, autocast: bool) -> list[Tensor]:
    """The output of a training step, and all its gradients."""
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x)
    y.float().square().mean().backward()
    return [y.detach().float(), *(parameter.grad for parameter in module.parameters() if parameter.grad is not None)]


@pytest.mark.slow  # a minute of C++
def test_after_a_step_in_autocast_comes_one_in_fp32_on_another_size() -> None:
    eager = network("zeros")
    compiled = torch.compile(copy.deepcopy(eager))
    for size, autocast, bound in (((32, 48), True, 2e-2), ((41, 27), False, 1e-5)):
        x = torch.randn(2, 3, *size)
        ours, theirs = (gradients(module, x, autocast) for module in (compiled, eager))
        assert len(ours) == len(theirs) == 1 + len(list(eager.parameters()))
        assert all(relative_error(a, b) < bound for a, b in zip(ours, theirs, strict=True))
