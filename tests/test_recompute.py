"""`recompute=True` costs time and no exactness: gradients however often they are asked for, and of higher order."""

from __future__ import annotations

import copy
from functools import partial

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
    assert isa > 1.4 * dense
