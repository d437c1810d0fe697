"""Steps in training, compiled for maps of any size; the loop itself runs in the recipe compile-and-autocast."""

from __future__ import annotations

import pytest

from tests.compiling import run_compiling

PROGRAM = """
from unittest.mock import patch
import torch
from torch import nn
from torch._inductor.graph import GraphLowering
from isa_triton import ISAModule

class Lowered(Exception):
    pass  # inductor has laid out a graph, and would generate code

isa = ISAModule(8, 3, 5, 6, partition_size=(3, 2), padding="mask", dropout=0.0)
network = nn.Sequential(nn.Conv2d(3, 8, 7, stride=4, padding=3), isa, nn.Conv2d(6, 5, 1))
with (
    patch.object(GraphLowering, "compile_to_module", side_effect=Lowered),
    torch.autocast("cpu", torch.bfloat16),
):
    torch.compile(network, dynamic=True)(torch.randn(2, 3, 41, 27))
"""


@pytest.mark.slow  # half a minute
def test_inductor_lays_out_a_training_step_of_any_size() -> None:
    """In a process of its own: a compiler that is interrupted leaves traces."""
    result = run_compiling("-c", PROGRAM)
    assert "InductorError: Lowered" in result.stderr, result.stderr
