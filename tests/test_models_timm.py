"""timm's SwinV2, accelerated. (MaxViT and Swin: test_timm.py.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.models.exact import network, typed
from isa_triton.models import accelerate
from tests.accelerated_models import zoo

ENTRIES = [entry for entry in zoo("timm") if "V2" in entry.name]


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
