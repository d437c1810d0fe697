"""torchvision's Swin, SwinV2 and video Swin, accelerated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from bench.models.exact import network, typed
from bench.models.zoo import Entry, Size
from isa_triton.models import accelerate, report
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


def test_is_averaged_and_distributed(tmp_path: Path) -> None:
    """What wraps a network of torchvision's wraps an accelerated one: averaged weights, and data parallel training."""
    entry = ENTRIES[0]
    model, (x,) = accelerate(network(entry, torch.float32)), typed(entry.inputs(entry.sizes[0]), torch.float32)
    average = AveragedModel(model)
    average.update_parameters(model)
    assert sum(found.taken for found in report(average)) == 4
    assert torch.equal(average(x), model(x))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        parallel(x).sum().backward()
    finally:
        dist.destroy_process_group()
    assert all(parameter.grad is not None for parameter in model.parameters())
