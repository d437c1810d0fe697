"""Published weights are found behind whatever wrapped the network that was saved, and come as tensors with values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from isa_triton import ISAHead
from isa_triton.checkpoints import from_mmseg, from_openseg, from_paddleseg
from isa_triton.models.ianet import from_mmseg as network_from_mmseg
from tests.test_checkpoints import LAYOUTS, as_published, head_weights, openseg_network
from tests.test_models import mmseg_network

Weights = dict[str, Tensor]


def wrapped(weights: Weights, prefix: str) -> Weights:
    return {prefix + name: x for name, x in weights.items()}


def averaged(weights: Weights) -> Weights:
    """mmengine's averaged model: a step counter beside the network."""
    return wrapped(weights, "module.") | {"steps": torch.tensor(7)}


def with_shadows(weights: Weights) -> Weights:
    """mmcv's hook keeps averages as buffers of the network."""
    return weights | {f"ema_{name.replace('.', '_')}": 2 * x for name, x in weights.items()}


WRAPPERS: dict[str, Callable[[Weights], Weights]] = {
    "data parallel": lambda weights: wrapped(weights, "module."),
    "compiled": lambda weights: wrapped(weights, "_orig_mod."),
    "trainer": lambda weights: wrapped(weights, "model."),
    "compiled, data parallel, trainer": lambda weights: wrapped(weights, "model.module._orig_mod."),
    "averaged by mmengine": averaged,
    "averaged by mmcv": with_shadows,
    "averaged by torch": lambda weights: wrapped(weights, "module.") | {"n_averaged": torch.tensor(7)},
}
HEAD: dict[str, tuple[Callable[[], Weights], Callable[[Weights], Weights]]] = {
    "mmseg": (lambda: as_published(head_weights(*LAYOUTS["mmseg"][:3]), "mmseg"), from_mmseg),
    "paddleseg": (lambda: as_published(head_weights(*LAYOUTS["paddleseg"][:3]), "paddleseg"), from_paddleseg),
    "openseg": (openseg_network, from_openseg),
    "mmseg, whole": (mmseg_network, network_from_mmseg),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("layout", ["mmseg", "openseg", "mmseg, whole"])
def test_wrapped_networks_give_the_weights_of_the_network(layout: str, wrapper: str) -> None:
    make, convert = HEAD[layout]
    weights = make()
    expected, found = convert(weights), convert(WRAPPERS[wrapper](weights))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], x) for name, x in expected.items())


@pytest.mark.parametrize("layout", HEAD)
def test_weights_have_values_whatever_the_default_device(layout: str) -> None:
    make, convert = HEAD[layout]
    weights = make()
    with torch.device("meta"):
        found = convert(weights)
    assert {x.device.type for x in found.values()} == {"cpu"}


@pytest.mark.parametrize("layout", ["mmseg", "openseg", "mmseg, whole"])
def test_parameters_give_tensors_that_are_none(layout: str) -> None:
    make, convert = HEAD[layout]
    weights = {name: nn.Parameter(x) if x.is_floating_point() else x for name, x in make().items()}
    assert not any(isinstance(x, nn.Parameter) or x.requires_grad for x in convert(weights).values())


def test_assigned_weights_leave_statistics_without_gradients() -> None:
    make, convert = HEAD["mmseg"]
    weights = {name: nn.Parameter(x) if x.is_floating_point() else x for name, x in make().items()}
    found = convert(weights)
    channels, classes = found["classifier.weight"].shape[1], found["classifier.weight"].shape[0]
    key_channels, in_channels = (
        found["isa.branches.0.long_range.key.0.conv.weight"].shape[0],
        found["reduce.conv.weight"].shape[1],
    )
    head = ISAHead(in_channels, channels, classes, key_channels=key_channels)
    head.load_state_dict(found, assign=True)
    assert not any(x.requires_grad for x in head.buffers())
    assert all(x.requires_grad for x in head.parameters())
