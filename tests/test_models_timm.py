"""timm's SwinV2, accelerated. (MaxViT and Swin: test_timm.py.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.models.exact import network, typed
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

ENTRIES = [entry for entry in zoo("timm") if "V2" in entry.name]


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


@pytest.mark.parametrize("separate", [False, True])
def test_biases_of_queries_and_values(separate: bool) -> None:
    entry = ENTRIES[0]
    model: Any = network(entry)
    inputs = typed(entry.inputs(entry.sizes[2]), torch.float64)
    for block in model.layers[0].blocks:
        block.attn.qkv_bias_separate = separate
    model.layers[1].blocks[0].attn.q_bias = None
    with torch.no_grad():
        expected = model(*inputs)
        torch.testing.assert_close(accelerate(model)(*inputs), expected, rtol=1e-10, atol=1e-10)
