"""What is faster on a CPU, in graphs and without: ReLU by its result, values and output in one product, oneDNN."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.flop_counter import FlopCounterMode

import reference
from isa_triton import InterlacedSparseSelfAttention, SelfAttention2d
from isa_triton.backend import eager
from isa_triton.maps import Conv1x1, ConvNormReLU, linear
from tests.cases import assert_same, outputs_and_gradients, relative_error


def test_relu_in_a_training_graph_keeps_no_mask() -> None:
    """Inductor takes longer over truth values than over all else in a block; what is kept are maps of numbers."""
    unit = ConvNormReLU(Conv1x1(6, 5)).double()
    x = torch.randn(2, 6, 9, 7, dtype=torch.float64, requires_grad=True)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    results: dict[bool, tuple[Tensor, ...]] = {}
    for compiles in (False, True):
        unit.zero_grad()
        f: Any = torch.compile(unit, fullgraph=True, backend="aot_eager_decomp_partition") if compiles else unit
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = f(x)
        results[compiles] = y, *torch.autograd.grad(y.sin().sum(), (x, *unit.parameters()))
        masks = [t for t in kept if t.dtype == torch.bool]
        kept.clear()
    for expected, actual in zip(results[False], results[True], strict=True):
        assert relative_error(actual, expected) < 1e-12
    assert not masks


def test_relu_in_a_graph_has_pytorch_s_gradient_at_zero() -> None:
    unit = ConvNormReLU(nn.Conv2d(1, 1, 1, bias=False), norm_layer=lambda _: nn.Identity())
    unit.conv.weight.data.fill_(1)
    x = torch.tensor([-1.0, -0.0, 0.0, 2.0]).view(1, 1, 2, 2).requires_grad_()
    torch.compile(unit, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(("num_heads", "channels", "folds"), [(1, 6, True), (1, 9, False), (2, 6, False)])
def test_values_and_output_are_one_product_where_that_is_less_work(num_heads: int, channels: int, folds: bool) -> None:
    layer = SelfAttention2d(channels, 4, 8, 5, pattern="local", partition_size=2, num_heads=num_heads).double()
    watched = copy.deepcopy(layer)
    watched.value.register_forward_hook(lambda *_: None)  # somebody wants to see the values
    x = torch.randn(2, channels, 6, 4, dtype=torch.float64)
    with patch.object(Conv1x1, "forward", autospec=True, side_effect=Conv1x1.forward) as conv:
        actual = outputs_and_gradients(layer, x)
    called = {id(call.args[0]) for call in conv.call_args_list}
    assert (id(layer.value) not in called) == folds == (id(layer.output.conv) not in called)
    assert_same(actual, outputs_and_gradients(watched, x), tolerance=1e-12)


def test_a_block_under_torch_compile_learns_what_the_reference_learns() -> None:
    ours = InterlacedSparseSelfAttention(6, 4, 8, partition_size=(3, 2)).double()
    theirs = reference.InterlacedSparseSelfAttention(6, 4, 8, 6, partition_size=(3, 2)).double()
    theirs.load_state_dict(ours.state_dict())
    x, counter = torch.randn(2, 6, 8, 7, dtype=torch.float64), CompileCounter()
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    actual = outputs_and_gradients(ours, x, lambda _, x: compiled(x))
    assert_same(actual, outputs_and_gradients(theirs, x), tolerance=1e-9)
    assert counter.frame_count == 1


@pytest.mark.parametrize("transposed", ["", "a", "b"])
@pytest.mark.parametrize("beta", [0, 1])
def test_large_products_are_multiplied_one_by_one(transposed: str, beta: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a = torch.randn(3, 20, 12) if transposed != "a" else torch.randn(3, 12, 20).mT
    b = torch.randn(3, 12, 16) if transposed != "b" else torch.randn(3, 16, 12).mT
    out = torch.randn(3, 20, 16)
    expected = 0.7 * (a.double() @ b.double()) + beta * out.double()
    for least in (1, 2**40):
        monkeypatch.setattr(eager, "_WORTH_A_CALL", least)
        with patch.object(eager, "_LINEAR", wraps=eager._LINEAR) as linear, FlopCounterMode(display=False) as counter:
            eager._product(a, b, out=(actual := out.clone()), alpha=0.7, beta=beta)
        assert linear.call_count == (3 if least == 1 else 0)
        assert counter.get_total_flops() == 2 * 3 * 20 * 12 * 16
        assert relative_error(actual.double(), expected) < 1e-6


@pytest.mark.parametrize("shape", [(3, 40, 50, 6), (40, 300, 6), (1, 6000, 6)])
def test_linear_by_onednn_is_linear(shape: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(shape), torch.randn(5, 6), torch.randn(5)
    expected = nn.functional.linear(x.double(), weight.double(), bias.double())
    with patch.object(torch.nn.functional, "conv2d", wraps=torch.nn.functional.conv2d) as conv2d:
        actual = linear(x, weight, bias)
    assert conv2d.called
    assert actual.is_contiguous()
    assert relative_error(actual.double(), expected) < 1e-6
