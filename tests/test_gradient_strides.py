"""A parameter's gradient lies as the parameter does: fused optimisers and DDP's buckets copy others in every step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from isa_triton import ISAHead, ISAModule
from isa_triton.models.ianet import IANet

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: ISAModule(6, 4, 5, 7, partition_size=((3, 4), (2, 2))),
    "head": lambda: ISAHead(6, 8, 3, key_channels=4, partition_size=(3, 4), num_heads=2, recompute=True),
    "network": lambda: IANet(nn.Conv2d(6, 8, 3, stride=2), ISAHead(8, 6, 3, key_channels=4, partition_size=3)),
}
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def check(model: nn.Module, call: Callable[[torch.Tensor], Any], format: torch.memory_format) -> None:
    """Run a step of training, and compare strides, those of dimensions of one element included."""
    y = call(torch.randn(2, 6, 10, 13).to(memory_format=format))
    (y["out"] if isinstance(y, dict) else y).float().square().sum().backward()
    parameters: dict[str, Any] = dict(model.named_parameters())
    strides = {name: (p.stride(), p.grad.stride()) for name, p in parameters.items()}
    assert {name: both for name, both in strides.items() if both[0] != both[1]} == {}


@pytest.mark.parametrize(("name", "format", "autocast"), list(product(NETWORKS, FORMATS, [False, True])))
def test_gradients_have_the_strides_of_their_parameters(name: str, format: str, autocast: bool) -> None:
    model = NETWORKS[name]().to(memory_format=FORMATS[format])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        check(model, model, FORMATS[format])


@pytest.mark.parametrize("format", FORMATS)
def test_gradients_of_a_compiled_module_have_the_strides_of_their_parameters(format: str) -> None:
    model = NETWORKS["module"]().to(memory_format=FORMATS[format])
    check(model, torch.compile(model, backend="aot_eager"), FORMATS[format])
