"""Accelerated models call what stands in them: adapters, hooks, parametrised and replaced projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from isa_triton.models import accelerate, restore
from tests.cases import relative_error


class Adapted(nn.Module):
    """As libraries of adapters wrap a layer: its weight and bias, and a delta of low rank beside it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        conv = isinstance(base, nn.Conv2d)
        widths = (base.in_channels, base.out_channels) if conv else (base.in_features, base.out_features)
        make: Callable[..., nn.Module] = (lambda a, b: nn.Conv2d(a, b, 1)) if conv else nn.Linear
        self.delta = nn.Sequential(make(widths[0], 2), make(2, widths[1]))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.delta(x)


MAXVIT: dict[str, Any] = {"img_size": 64, "depths": (1, 1, 1, 1)}
SWIN: dict[str, Any] = {"img_size": 112, "depths": (2, 1, 1, 1), "embed_dim": 32, "num_heads": (1, 2, 4, 8)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "maxvit": ("maxvit_pico_rw_256", MAXVIT),
    "maxvit, NCHW": ("maxvit_rmlp_pico_rw_256", MAXVIT | {"transformer_use_nchw_attn": True}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}


def model(key: str) -> nn.Module:
    name, options = MODELS[key]
    return timm.create_model(name, num_classes=7, **options).double().eval()


def attentions(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if hasattr(module, "qkv") and hasattr(module, "proj")]


def image(network: nn.Module) -> Tensor:
    return torch.randn(2, 3, *((112, 112) if hasattr(network, "patch_embed") else (64, 64)), dtype=torch.float64)


def each_projection(network: nn.Module, change: Callable[[Any], nn.Module]) -> nn.Module:
    for attention in attentions(network):
        attention.qkv, attention.proj = change(attention.qkv), change(attention.proj)
    return network.double()


CHANGES: dict[str, Callable[[Any], nn.Module]] = {
    "adapter": Adapted,
    "weight norm": parametrizations.weight_norm,
    "replaced": lambda layer: nn.Sequential(layer, nn.Tanh()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first", ["accelerate", "change"])
def test_changed_projections_compute_and_learn_as_without_us(name: str, change: str, first: str) -> None:
    network = model(name)
    if first == "accelerate":
        accelerate(network)
    each_projection(network, CHANGES[change])
    accelerate(network)
    x = image(network)
    with torch.no_grad():
        inference = network(x)
    y = network(x)
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(y.sin().sum(), list(parameters.values()))
    expected = restore(network)(x)
    theirs = torch.autograd.grad(expected.sin().sum(), list(parameters.values()))
    assert relative_error(y, expected) < 1e-9
    assert relative_error(inference, expected) < 1e-9
    for parameter, ours, wanted in zip(parameters, gradients, theirs, strict=True):
        assert relative_error(ours, wanted) < 1e-9, parameter


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_hooks_see_every_call(name: str) -> None:
    network = accelerate(model(name))
    seen: list[str] = []
    for number, attention in enumerate(attentions(network)):
        for part in ("", "qkv", "proj"):
            where = f"{number}{part}"
            attention.get_submodule(part).register_forward_hook(lambda *_, where=where: seen.append(where))
    network(image(network))
    assert sorted(seen) == sorted(f"{i}{part}" for i in range(len(attentions(network))) for part in ("", "qkv", "proj"))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_a_hook_returns_counts(name: str) -> None:
    network = model(name)
    for attention in attentions(network):
        attention.qkv.register_forward_hook(lambda module, args, y: 0.5 * y)
        attention.register_forward_hook(lambda module, args, y: 0.9 * y)
    x = image(network)
    expected = network(x)
    assert relative_error(accelerate(network)(x), expected) < 1e-9


def test_an_attention_that_is_not_timms_is_left_alone() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(-1)

    network: Any = model("maxvit")
    blocks = [module for module in network.modules() if hasattr(module, "attn") and hasattr(module, "ls1")]
    blocks[0].attn = Other()
    x = image(network)
    with torch.no_grad():
        expected = network(x)
        assert relative_error(accelerate(network)(x), expected) < 1e-9
    assert not hasattr(blocks[0], "backend")
    for block in blocks:
        block.attn = Other()
    with pytest.raises(
        ValueError, match=r"must hold window attention .*: PartitionAttentionCl left: its attention is Other"
    ):
        accelerate(restore(network))


def test_timms_dropout_of_projections_stays() -> None:
    network = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(2,), embed_dim=16, num_heads=(1,))
    accelerate(network).train()
    calls = list[float]()
    for block in network.layers[0].blocks:
        block.attn.proj_drop = nn.Dropout(1.0)
        block.attn.register_forward_hook(lambda module, args, y: calls.append(float(y.detach().abs().max())))
    network(torch.randn(2, 3, 56, 56))
    assert calls == [0.0, 0.0]
