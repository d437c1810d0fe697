"""`bench.compared.heads`: every head of the paper by its name, trainable, and of the published widths."""

from __future__ import annotations

import doctest

import pytest
import torch
from torch import nn

from bench.compared import heads
from bench.compared.heads import CONTEXTS, Widths, head
from isa_triton import ISAHead
from isa_triton.models.ianet import fcn_head

CLASSES, SIZE = 5, (7, 9)


@pytest.mark.parametrize("name", CONTEXTS)
def test_every_head_gives_logits_and_learns(name: str) -> None:
    module = head(name, 32, 16, CLASSES, (2, 3))
    logits = module(torch.randn(2, 32, *SIZE))
    assert logits.shape == (2, CLASSES, *SIZE)
    logits.square().mean().backward()
    parameters = dict(module.named_parameters())
    assert {n for n, p in parameters.items() if p.grad is None} == set()
    assert any(p.grad.abs().max() > 0 for p in parameters.values() if p.grad is not None)


@pytest.mark.parametrize("name", [name for name in CONTEXTS if name != "none"])
@torch.no_grad()
def test_a_head_sees_the_whole_map_and_without_context_it_does_not(name: str) -> None:
    """The far corner moves when the near one does, once blocks that begin as the identity are no longer."""
    x = torch.randn(1, 32, 12, 13, dtype=torch.float64)
    moved = x.clone()
    moved[..., 0, 0] += 1
    for other in (name, "none"):
        module = head(other, 32, 16, CLASSES, (3, 4)).double().eval()
        for parameter_name, parameter in module.named_parameters():
            if parameter_name.endswith(("gamma", "output.weight", "norm.weight")):
                nn.init.uniform_(parameter, 0.5, 1.5)
        difference = (module(x) - module(moved))[..., -1, -1].abs().max()
        assert (difference > 0) == (other != "none")


def test_isa_is_the_librarys_head_and_none_is_the_fcn() -> None:
    isa, none = head("ISA", 32, 16, CLASSES, (2, 3)), head("none", 32, 16, CLASSES)
    ISAHead(32, 16, CLASSES, key_channels=8, partition_size=(2, 3)).load_state_dict(isa.state_dict())
    fcn = fcn_head(32, 16, CLASSES)
    assert [p.shape for p in none.parameters()] == [p.shape for p in fcn.parameters()]
    assert heads.isa(Widths(32, 16))(torch.randn(1, 32, 3, 4)).shape == (1, 16, 3, 4)


def test_examples_in_docstrings() -> None:
    results = doctest.testmod(heads, extraglobs={"torch": torch})
    assert (results.failed, results.attempted) == (0, 1)
