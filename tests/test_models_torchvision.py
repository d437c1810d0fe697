"""torchvision's Swin, SwinV2 and video Swin, accelerated."""

from __future__ import annotations

import pytest
import torch

from bench.models.exact import network
from bench.models.zoo import Entry, Size
from isa_triton.models import accelerate
from tests.accelerated_models import (
    check_exported,
    check_module_like_others,
    check_one_graph,
    check_same_function,
    sizes,
    zoo,
)

ENTRIES = zoo("torchvision")


@pytest.mark.parametrize(("entry", "size"), sizes(ENTRIES))
def test_is_the_same_function(entry: Entry, size: Size) -> None:
    check_same_function(entry, size)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_is_a_module_like_others(entry: Entry) -> None:
    check_module_like_others(entry)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_is_one_graph(entry: Entry) -> None:
    check_one_graph(entry)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_is_exported(entry: Entry) -> None:
    check_exported(entry)


def test_a_graph_that_has_no_block_left_says_so() -> None:
    traced = torch.fx.symbolic_trace(network(ENTRIES[0]))
    with pytest.raises(ValueError, match=r"without any; a graph of torch.fx .*: accelerate what it is traced from"):
        accelerate(traced)
