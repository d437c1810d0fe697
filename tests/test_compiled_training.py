"""Steps in training, compiled for maps of any size; the loop itself runs in the recipe compile-and-autocast."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering

from isa_triton import ISAModule


class Lowered(Exception):
    """Inductor has laid out a graph, and would generate code."""


def network(padding: str) -> nn.Sequential:
    torch.manual_seed(0)
    isa = ISAModule(8, 3, 5, 6, partition_size=(3, 2), padding=padding, dropout=0.0)
    return nn.Sequential(nn.Conv2d(3, 8, 7, stride=4, padding=3), isa, nn.Conv2d(6, 5, 1))


@pytest.mark.slow  # a quarter of a minute each
@pytest.mark.parametrize(("padding", "autocast"), [("zeros", False), ("mask", True)])
def test_inductor_lays_out_a_training_step_of_any_size(padding: str, autocast: bool) -> None:
    compiled = torch.compile(network(padding), dynamic=True)
    with (
        patch.object(GraphLowering, "compile_to_module", side_effect=Lowered),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(InductorError, match="Lowered"),
    ):
        compiled(torch.randn(2, 3, 41, 27))
