"""The vision tower of Qwen2.5-VL, accelerated."""

from __future__ import annotations

import copy

import pytest
import torch

from bench.models.exact import network
from bench.models.zoo import Entry, Size
from isa_triton.models import accelerate
from tests.accelerated_models import (
    check_module_like_others,
    check_same_function,
    sizes,
    zoo,
)

ENTRIES = zoo("transformers_qwen")


@pytest.mark.parametrize(("entry", "size"), sizes(ENTRIES))
def test_is_the_same_function(entry: Entry, size: Size) -> None:
    check_same_function(entry, size)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_is_a_module_like_others(entry: Entry) -> None:
    check_module_like_others(entry)


def test_images_of_several_sizes_are_left_to_theirs() -> None:
    theirs = network(ENTRIES[0])
    x, grid = ENTRIES[0].inputs((2, 8, 12))
    grid[1] = torch.tensor([2, 12, 8])
    ours = accelerate(copy.deepcopy(theirs))
    with torch.no_grad():
        expected = ENTRIES[0].result(theirs(x, grid))
        assert torch.equal(ENTRIES[0].result(ours(x, grid)), expected)


def test_the_tokens_of_every_layer_are_sorted_as_theirs_are() -> None:
    theirs, inputs = network(ENTRIES[0]), ENTRIES[0].inputs((1, 8, 12))
    ours = accelerate(copy.deepcopy(theirs))
    with torch.no_grad():
        layers = [model(*inputs, output_hidden_states=True).hidden_states for model in (theirs, ours)]
    assert len(layers[0]) == 4
    torch.testing.assert_close(layers[1], layers[0])
    assert torch.equal(ours(*inputs, return_dict=False)[1], ours(*inputs).pooler_output)
