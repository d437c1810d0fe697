"""Our batch normalisation is PyTorch's, and exact on channels_last maps of a CPU as well; so are the layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from isa_triton import InterlacedSparseSelfAttention, ISAHead, ISAModule
from isa_triton.inference import fuse
from isa_triton.maps import RELU
from isa_triton.norm import BatchNorm2d, _runs
from tests.cases import outputs_and_gradients

EPS = torch.finfo(torch.float32).eps
# pixels in one row, of a prime number, of many images; fewer than are added up in runs
SIZES = [(2, 16, 97, 33), (1, 16, 1, 1009), (1, 16, 1009, 1), (64, 16, 8, 8), (3, 16, 5, 7)]


def channels_last(*size: int, mean: float = 0.0) -> Tensor:
    return (torch.randn(size) + mean).to(memory_format=torch.channels_last)


def norm(kind: type[nn.BatchNorm2d], **options: Any) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    made = kind(16, **options)
    if made.affine:
        nn.init.uniform_(made.weight, 0.5, 1.5)
        nn.init.normal_(made.bias)
    return made


def passes(module: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two passes, whose running statistics are those of both."""
    module = copy.deepcopy(module).to(dtype)
    outputs_and_gradients(module, x.flip(2).to(dtype))
    return outputs_and_gradients(module, x.to(dtype))


def errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference of every tensor, as a part of its largest entry."""
    assert actual.keys() == exact.keys()
    differences = {name: (actual[name].detach() - x.detach()).abs().max() for name, x in exact.items()}
    return {name: float(differences[name] / x.detach().abs().max()) for name, x in exact.items()}


@pytest.mark.parametrize("mean", [0.0, 5.0])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_numbers_are_exact_to_some_roundings(size: tuple[int, ...], mean: float) -> None:
    x = channels_last(*size, mean=mean)
    exact = passes(norm(nn.BatchNorm2d), x, torch.float64)
    assert max(errors(passes(norm(BatchNorm2d), x), exact).values()) < 8 * EPS


@pytest.mark.parametrize("size", [(1, 4096), (4096, 1), (64, 64)], ids=str)
def test_as_many_pixels_as_runs_on_maps_of_one_row_too(size: tuple[int, int]) -> None:
    assert _runs(channels_last(1, 3, *size)) == 64


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.3, "eps": 0.5}, {"affine": False}, {"track_running_stats": False}],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_options_mean_what_they_mean_to_pytorch(options: dict[str, Any], training: bool) -> None:
    x = channels_last(2, 16, 20, 30, mean=1.0)
    ours, theirs = (norm(kind, **options).train(training) for kind in (BatchNorm2d, nn.BatchNorm2d))
    assert str(ours) == str(theirs)
    ours.load_state_dict(theirs.state_dict())
    found = errors(passes(ours, x), passes(theirs, x, torch.float64))
    assert max(found.values()) < 8 * EPS
    assert ("num_batches_tracked" in found) == options.get("track_running_stats", True)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    ours, x = norm(BatchNorm2d), channels_last(2, 16, 20, 30).requires_grad_()
    leaves: dict[str, Tensor] = {"x": x, **dict(ours.named_parameters())}
    leaves[frozen].requires_grad_(False)
    expected = {name: leaf.detach().double().requires_grad_(name != frozen) for name, leaf in leaves.items()}
    upstream = torch.randn(x.shape)  # NCHW
    ours(x).backward(upstream)
    y = nn.functional.batch_norm(expected["x"], None, None, expected["weight"], expected["bias"], True)
    y.backward(upstream.double())
    assert leaves.pop(frozen).grad is None
    for name, leaf in leaves.items():
        gradient, exact = leaf.grad, expected[name].grad
        assert gradient is not None
        assert exact is not None
        assert max(errors({name: gradient}, {name: exact}).values()) < 8 * EPS


def test_derivatives_of_second_order_and_in_forward_mode_are_pytorchs() -> None:
    x, v = channels_last(2, 16, 20, 30, mean=1.0), channels_last(2, 16, 20, 30)

    def second(module: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaf = x.to(dtype).requires_grad_()
        (first,) = torch.autograd.grad(module(leaf).sin().sum(), leaf, create_graph=True)
        return torch.autograd.grad((first * v.to(dtype)).sum(), [leaf, module.weight])

    def forward(module: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, ...]:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(x.to(dtype), v.to(dtype))))

    for derivative in (second, forward):
        got = derivative(norm(BatchNorm2d), torch.float32)
        expected = derivative(norm(nn.BatchNorm2d).double(), torch.float64)
        found = [errors({"": a}, {"": b})[""] for a, b in zip(got, expected, strict=True)]
        assert max(found) < 1e-4, derivative


def test_what_knows_pytorchs_knows_ours() -> None:
    layer = ISAModule(16, 16, 16, 16, partition_size=(4, 3))
    norms = [part for part in layer.modules() if isinstance(part, nn.BatchNorm2d)]
    assert {type(part) for part in norms} == {BatchNorm2d}
    folded = fuse(layer)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(layer))
    assert sum(isinstance(part, nn.SyncBatchNorm) for part in synchronised.modules()) == len(norms)
    assert synchronised.state_dict().keys() == layer.state_dict().keys()


@pytest.mark.slow
def test_it_is_compiled_in_one_graph_for_several_sizes() -> None:
    ours = norm(BatchNorm2d)
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((20, 30), (31, 17), (16, 40)):
        x = channels_last(2, 16, *size, mean=1.0)
        assert errors({"": compiled(x)}, {"": ours(x)})[""] < 1e-5


LAYERS = {
    "layer": lambda **o: InterlacedSparseSelfAttention(16, 8, 16, partition_size=(8, 8), **o),
    "masked": lambda **o: InterlacedSparseSelfAttention(16, 8, 16, partition_size=(8, 8), padding="mask", **o),
    "module": lambda **o: ISAModule(16, 8, 16, 16, partition_size=((8, 8), (5, 4)), dropout=0.0, **o),
    "head": lambda **o: ISAHead(16, 16, 5, key_channels=8, dropout=0.0, **o),
}


@pytest.mark.parametrize(
    ("name", "activation", "most"),
    [
        ("layer", nn.GELU, 4e-5),
        ("masked", nn.GELU, 4e-5),
        ("module", nn.GELU, 1e-4),
        ("head", nn.GELU, 2e-4),
        ("layer", RELU, 5e-3),
    ],
    ids=["layer", "masked", "module", "head", "layer with ReLU, whose derivative jumps"],
)
def test_layers_in_training_are_exact(name: str, activation: Any, most: float) -> None:
    """Outputs and all gradients in fp32 against fp64 at 97x33: with PyTorch's norm they are 10 to 100 times as far."""
    torch.manual_seed(0)
    layer, x = LAYERS[name](activation=activation), torch.randn(2, 16, 97, 33) + 1
    exact = outputs_and_gradients(copy.deepcopy(layer).double(), x.double())
    found = errors(outputs_and_gradients(layer, x), exact)
    assert max(found.values()) < most, found
