"""Published values as literals: a constant that changes by accident is met by none of the tests that import it."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from torch import nn

from bench.tiles.roofline import MACHINES
from bench.train.data import MEAN, STD
from bench.train.recipe import RECIPES, Recipe
from isa_triton import InterlacedSparseSelfAttention, ISAHead, ISAModule, SelfAttention2d
from isa_triton.models.ianet import fcn_head


def defaults(of: Any) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(of).parameters.items()}


def test_the_layers_have_the_papers_defaults() -> None:
    """arXiv 1907.12273 and the authors' code: P = 8, K = 256, dropout 0.05 in the module and 0.1 in the head."""
    assert defaults(ISAModule)["dropout"] == 0.05
    assert (defaults(ISAHead)["dropout"], defaults(ISAHead)["key_channels"]) == (0.1, 256)
    assert defaults(fcn_head)["dropout"] == 0.1
    for layer in (SelfAttention2d, InterlacedSparseSelfAttention, ISAModule, ISAHead):
        assert defaults(layer)["partition_size"] == 8  # of every axis
    head = ISAHead(32, 16, 19)
    assert [part.p for part in head.modules() if isinstance(part, nn.Dropout2d)] == [0.1]
    assert {part.eps for part in head.modules() if isinstance(part, nn.BatchNorm2d)} == {1e-5}
    branches: Any = head.isa.branches
    stage = branches[0].long_range
    assert (stage.query[0].conv.out_channels, stage.padding, stage.num_heads) == (256, "zeros", 1)


def test_the_recipes_are_the_papers() -> None:
    """SGD with momentum 0.9, poly 0.9, auxiliary loss 0.4, scales 0.5 to 2; crop, batch, rate, decay, iterations."""
    values = {field.name: field.default for field in fields(Recipe)}
    assert (values["momentum"], values["power"], values["auxiliary"], values["jitter"]) == (0.9, 0.9, 0.4, (0.5, 2.0))
    published = {
        "cityscapes": ((512, 1024), 8, 0.01, 5e-4, 40_000, 8),
        "ade20k": ((520, 520), 16, 0.02, 1e-4, 150_000, 8),
        "lip": ((473, 473), 32, 0.007, 5e-4, 110_000, 16),
    }
    names = "crop", "batch", "lr", "weight_decay", "iterations", "output_stride"
    assert {name: tuple(RECIPES[name][column] for column in names) for name in published} == published
    assert (MEAN, STD) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of ImageNet, as torchvision's weights


def test_machines_are_those_of_the_data_sheets() -> None:
    """SMs, clock in MHz, TFLOP/s of 16-bit products and GB/s of memory, from the sources that `MACHINES` names."""
    sheet = {
        name: (machine.sms, machine.clock / 1e6, machine.matrix["16-bit"] / 1e12, machine.dram / 1e9)
        for name, machine in MACHINES.items()
    }
    assert {name: tuple(round(value, 3) for value in values) for name, values in sheet.items()} == {
        "A100": (108, 1410, 312, 2039),
        "A10": (72, 1695, 125, 600),
        "H100": (132, 1830, 989.4, 3350),
        "H200": (132, 1830, 989.4, 4800),
        "B200": (148, 1850, 2250, 8000),
        "MI300X": (304, 2100, 1307.4, 5300),
        "RX7900XTX": (48, 2500, 122.8, 960),
    }
    assert {name: machine.special for name, machine in MACHINES.items() if name != "RX7900XTX"} == dict.fromkeys(
        ("A100", "A10", "H100", "H200", "B200", "MI300X"), 16
    )
