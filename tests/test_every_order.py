"""Accelerated, adapted and folded, in every order, then traced and exported: after each step the same function."""

from __future__ import annotations

import copy
from itertools import permutations, product
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from isa_triton import ISAHead
from isa_triton.inference import fuse
from isa_triton.models import accelerate
from tests.cases import relative_error

BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "MaxViT": ("maxvit_nano_rw_256", {"img_size": 64}),
    "MaxViT, tf": ("maxvit_tiny_tf_224", {"img_size": 64}),
    "Swin": ("swin_tiny_patch4_window7_224", {"img_size": 112}),
}


class Segmenter(nn.Module):
    """A backbone of timm under our head."""

    def __init__(self, name: str) -> None:
        super().__init__()
        model, options = BACKBONES[name]
        self.side = options["img_size"]
        self.backbone = timm.create_model(model, features_only=True, out_indices=(1,), depths=(1, 1, 1, 1), **options)
        (channels,) = self.backbone.feature_info.channels()
        self.channels_last = name == "Swin"
        self.head = ISAHead(channels, 8, 3, key_channels=4, partition_size=(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        (y,) = self.backbone(x)
        return self.head(y.permute(0, 3, 1, 2) if self.channels_last else y)


class Adapter(nn.Module):
    """What libraries of adapters put in the place of a projection."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.delta = nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.delta(x)


def adapt(network: nn.Module) -> nn.Module:
    """Adapters with the same weights every time."""
    torch.manual_seed(1)
    for module in list(network.modules()):
        if isinstance(getattr(module, "qkv", None), nn.Linear):
            module.qkv = Adapter(module.qkv)
    return network.eval()


STEPS: dict[str, Any] = {"accelerate": accelerate, "adapt": adapt, "fuse": fuse}


@pytest.mark.filterwarnings("ignore")  # of the tracers, about themselves
@pytest.mark.slow  # programs of networks in every order
@pytest.mark.parametrize(
    ("name", "order"),
    [
        *product(("MaxViT", "Swin"), permutations(STEPS)),
        ("MaxViT, tf", tuple(STEPS)),
        ("MaxViT, tf", tuple(STEPS)[::-1]),
    ],
)
@torch.no_grad()
def test_each_step_leaves_the_function_as_it_is(name: str, order: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    network = Segmenter(name).eval()
    plain, adapted = copy.deepcopy(network), adapt(copy.deepcopy(network))
    x = torch.randn(2, 3, network.side, network.side)
    changed: nn.Module = network
    for i, step in enumerate(order):
        changed = STEPS[step](changed)
        expected = (adapted if "adapt" in order[: i + 1] else plain)(x)
        assert relative_error(changed(x), expected) < 1e-5, step
    assert relative_error(plain(x), expected) > 1e-3  # each step did something
    kinds = {type(module).__name__ for module in changed.modules()}
    assert {"Adapter", "FoldedAttention"} < kinds
    assert any(kind.startswith("Accelerated") for kind in kinds)
    traced, program = torch.jit.trace(changed, x), torch.export.export(changed, (x,)).module()
    other = torch.randn(1, 3, network.side, network.side)
    assert relative_error(traced(other), adapted(other)) < 1e-5
    assert relative_error(program(x), expected) < 1e-5
