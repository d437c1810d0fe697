"""`recompute=True` costs time and no exactness: gradients however often they are asked for, and of higher order."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import measure
from bench.compared import PROVIDERS, Provider
from bench.compared.modules import isa_block
from bench.workload import Workload
from isa_triton import ISAModule, SelfAttention2d
from tests.cases import relative_error


def modules() -> tuple[nn.Module, nn.Module, Tensor]:
    """The same module with and without recomputing, in training, and a map that P does not divide."""
    plain = ISAModule(5, 4, 6, 7, partition_size=(3, 4), dropout=0).double().train()
    recomputing = copy.deepcopy(plain)
    for stage in recomputing.modules():
        if isinstance(stage, SelfAttention2d):
            stage.recompute = True
    return plain, recomputing, torch.randn(2, 5, 7, 10, dtype=torch.float64, requires_grad=True)


def test_two_losses_share_a_graph() -> None:
    plain, recomputing, x = modules()
    gradients = []
    for module in (plain, recomputing):
        y = module(x)
        first = torch.autograd.grad(y.sin().sum(), [x, *module.parameters()], retain_graph=True)
        second = torch.autograd.grad(y.square().sum(), [x, *module.parameters()], retain_graph=True)
        third = torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])
        assert all(map(torch.equal, first, third))
        gradients.append((*first, *second))
    assert max(map(relative_error, *gradients)) < 1e-12


def test_statistics_count_a_batch_once_however_often_backward_runs() -> None:
    plain, recomputing, x = modules()
    for module in (plain, recomputing):
        y = module(x)
        for _ in range(3):
            y.sum().backward(retain_graph=True)
    for ours, theirs in zip(recomputing.buffers(), plain.buffers(), strict=True):
        assert relative_error(ours.double(), theirs.double()) < 1e-12


def test_threads_that_share_a_layer_count_every_batch_once() -> None:
    _, recomputing, _ = modules()
    counts = [x for name, x in recomputing.named_buffers() if name.endswith("num_batches_tracked")]

    def train(seed: int) -> Tensor:
        x = torch.randn(2, 5, 7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for _ in range(4):
            recomputing(x).sum().backward()
        return x

    with ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(train, range(16)))) == 16
    assert [int(count) for count in counts] == [64] * len(counts)
    assert len(counts) > 8


def test_a_layer_whose_forward_was_replaced_is_not_recomputed() -> None:
    stage = SelfAttention2d(5, 4, 6, pattern="dense", recompute=True).train()
    norm: Any = stage.query[0].norm
    norm.forward = norm.forward
    y = stage(torch.randn(2, 5, 3, 4))
    with pytest.raises(TypeError, match=r"recompute must be False for a BatchNorm2d whose forward was replaced"):
        y.sum().backward()


def test_second_derivatives_are_those_without_recomputing() -> None:
    plain, recomputing, x = modules()
    second = []
    for module in (plain, recomputing):
        (gradient,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(gradient.square().sum(), [x, *module.parameters()], allow_unused=True))
    pairs = [(a, b) for a, b in zip(*second, strict=True) if b is not None]
    assert len(pairs) > 10
    assert max(relative_error(b, a) for a, b in pairs) < 1e-11


def test_a_block_in_training_needs_the_bytes_of_fused_dense_attention() -> None:
    """Counted: two stages that recompute, beside one dense stage by PyTorch's sdpa (bench/README.md)."""

    def recomputing(workload: Workload) -> nn.Module:
        block = isa_block(workload)
        for stage in block.modules():
            if isinstance(stage, SelfAttention2d):
                stage.recompute = True
        return block

    workload = Workload("module", "training", 128, 128)
    providers = PROVIDERS["dense-sdpa"], PROVIDERS["isa"], Provider("recomputing", module=recomputing)
    dense, isa, ours = (measure.count(partial(measure.step, provider, workload))[1] for provider in providers)
    assert ours <= 1.02 * dense
    assert isa > 1.3 * dense


def test_a_block_in_inference_lets_go_of_what_attention_has_read() -> None:
    """Counted, by the kernels: beside weights no more than five maps of V, of which one is the block's input."""
    workload, block = Workload("module", "forward", 128, 128), PROVIDERS["isa-triton"]
    assert block.module is not None
    weights = sum(x.nbytes for x in block.module(workload).state_dict().values())
    peak = measure.count(partial(measure.step, block, workload))[1]
    assert peak - weights <= 5.01 * 4 * workload.pixels * workload.value_channels
