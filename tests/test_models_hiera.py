"""transformers' Hiera and that of its SAM 2, accelerated."""

from __future__ import annotations

import copy

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

ENTRIES = zoo("transformers_hiera")


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


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_what_attention_returns_is_shown_as_theirs(entry: Entry) -> None:
    theirs, (x,) = network(entry), entry.inputs((64, 96))
    ours = accelerate(copy.deepcopy(theirs))
    with torch.no_grad():
        expected, shown = (model(x, output_attentions=True).attentions for model in (theirs, ours))
    assert len(shown) > 1
    torch.testing.assert_close(shown, expected)
