"""transformers' Swin and its copies, accelerated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from bench.models.exact import network, typed
from bench.models.zoo import Entry
from isa_triton.models import accelerate, report
from tests.accelerated_models import zoo

ENTRIES = zoo("transformers")
BY_NAME = {entry.name: entry for entry in ENTRIES}
CLAMPED = [BY_NAME[name] for name in ("Swin", "Donut", "CLAP")]  # whose windows become as small as a map


def pair(entry: Entry) -> tuple[Any, Any, tuple[Any, ...]]:
    """A network, the same accelerated, and what they are called with."""
    theirs = network(entry)
    return theirs, accelerate(copy.deepcopy(theirs)), typed(entry.inputs(entry.sizes[0]), torch.float64)


def blocks(model: nn.Module) -> list[Any]:
    names = [finding.name for finding in report(model) if finding.taken]
    return [model.get_submodule(name) for name in names]


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.name != "MaskFormer"], ids=str)
def test_attention_weights_are_transformers_own(entry: Entry) -> None:
    """MaskFormer's model cannot return them: its stages hand none on."""
    theirs, ours, inputs = pair(entry)
    for model in (theirs, ours):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        expected, actual = (model(*inputs, output_attentions=True) for model in (theirs, ours))
    assert len(expected.attentions) > 0
    assert all(map(torch.equal, actual.attentions, expected.attentions))
    assert torch.equal(entry.result(actual), entry.result(expected))


def test_swin_that_always_wants_attention_weights_gets_them() -> None:
    theirs, ours, inputs = pair(BY_NAME["Swin"])
    for model in (theirs, ours):
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
    with torch.no_grad():
        assert all(map(torch.equal, ours(*inputs).attentions, theirs(*inputs).attentions))


def test_an_attention_that_was_registered_is_called() -> None:
    _, ours, inputs = pair(BY_NAME["Swin"])
    called = []

    def zero(module: nn.Module, query: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(module)
        return torch.zeros_like(query).transpose(1, 2), None

    transformers = pytest.importorskip("transformers")
    transformers.AttentionInterface.register("of_a_test", zero)
    ours.set_attn_implementation("of_a_test")
    with torch.no_grad():
        ours(*inputs)
    assert called == [block.attention for block in blocks(ours)]


@pytest.mark.parametrize("entry", CLAMPED, ids=str)
@pytest.mark.parametrize("always_partition", [False, True])
def test_windows_stay_as_small_as_a_map_was(entry: Entry, always_partition: bool) -> None:
    theirs, ours, _ = pair(entry)
    expected, actual = (
        model(*typed(entry.inputs(entry.sizes[0]), torch.float64)) and model for model in (theirs, ours)
    )
    window = blocks(actual)[1].window_size
    layers = [model.get_submodule(report(actual)[1].name) for model in (expected, actual)]
    x = torch.randn(2, window * (2 * window + 3), 24, dtype=torch.float64)  # one window high, which ends its shift
    then = torch.randn(2, (2 * window) ** 2, 24, dtype=torch.float64)
    with torch.no_grad():
        for tokens, size in ((x, (window, 2 * window + 3)), (then, (2 * window, 2 * window))):
            first, second = (layer(tokens, size, always_partition=always_partition)[0] for layer in layers)
            torch.testing.assert_close(second, first, rtol=1e-10, atol=1e-10)
    assert layers[0].shift_size == layers[1].shift_size == (window // 2 if always_partition else 0)


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.name != "CLAP"], ids=str)
def test_checkpoints_of_activations_are_transformers_own(entry: Entry) -> None:
    """CLAP's audio model does not support them."""
    theirs, ours, inputs = pair(entry)
    gradients = []
    for model in (theirs, ours):
        model.train()
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # its name since 5.24
        torch.manual_seed(0)
        entry.result(model(*inputs)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for actual, expected in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max() + 1))


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_what_stands_in_a_layer_is_called(entry: Entry) -> None:
    _, model, inputs = pair(entry)
    called: list[str] = []
    inside = [name for name, _ in blocks(model)[0].named_modules() if name]
    for name in inside:
        blocks(model)[0].get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        model(*inputs)
    assert set(called) == set(inside) - {"attention.self.dropout"}  # of attention weights


@pytest.mark.parametrize("entry", [BY_NAME["SwinV2"], BY_NAME["CLAP"]], ids=str)
def test_an_attention_of_somebody_else_is_left(entry: Entry) -> None:
    model = network(entry)
    first: Any = next(module for module in model.modules() if type(module).__name__.endswith("Layer"))
    first.attention.self = nn.Identity()
    findings = report(accelerate(model))
    assert [finding.taken for finding in findings] == [False, True, True, True]
    assert findings[0].why == "its attention is Identity"
