"""The compared providers over volumes: FLOPs, agreement, and who has no form."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from bench.compared import PROVIDERS
from bench.measure import count, step
from bench.workload import Level, Workload, closed_form_flops


@pytest.mark.parametrize("name", ["dense", "unfused", "isa"])
def test_flops_in_volumes_are_the_closed_form(name: str) -> None:
    workload = Workload("attention", "forward", 16, 24, 32, 16, 48, (2, 4, 4), depth=8)
    flops, _ = count(partial(step, PROVIDERS[name], workload))
    p = None if name == "dense" else workload.partition_size
    assert flops == pytest.approx(closed_form_flops(8 * 16 * 24, 16, 48, "forward", p), rel=1e-3)


@pytest.mark.parametrize(("one", "other"), [("dense", "dense-sdpa"), ("unfused", "isa")])
@pytest.mark.parametrize("level", ["attention", "module"])
def test_providers_of_one_function_agree_in_volumes(one: str, other: str, level: Level) -> None:
    workload = Workload(level, "training", 6, 8, 12, 8, 10, (2, 3, 4), dtype=torch.float64, depth=4)
    built = [PROVIDERS[name].build(workload) for name in (one, other)]
    if level == "module":  # of the same weights, by their order
        first, second = (list(module.state_dict().values()) for module in built if isinstance(module, torch.nn.Module))
        for a, b in zip(first, second, strict=True):
            b.copy_(a)
    outputs = [function(*workload.inputs()) for function in built]
    assert outputs[0].shape[1:4] == ((4, 6, 8) if level == "attention" else (12, 4, 6))
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-11)


def test_who_has_no_form_for_volumes_says_so() -> None:
    volume = Workload("attention", "forward", 8, 8, depth=8, partition_size=(4, 4, 4))
    assert PROVIDERS["rcca"].obstacle(volume) == "has no form of its own for volumes at attention level"
    assert (
        PROVIDERS["isa"].obstacle(replace(volume, level="head")) == "has no form of its own for volumes at head level"
    )
