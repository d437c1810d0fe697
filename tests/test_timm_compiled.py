"""Accelerated models of timm under torch.compile: one graph, in inference and in training."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from isa_triton.models import accelerate
from isa_triton.models.accelerated.timm import AcceleratedSwinBlock
from tests.cases import relative_error

MAXVIT: dict[str, Any] = {"img_size": 128, "depths": (1,), "embed_dim": (32,), "stem_width": 8}
SWIN: dict[str, Any] = {"img_size": (40, 72), "depths": (2,), "embed_dim": 16, "num_heads": (1,)}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # those of the table in isa_triton/models/README.md
    "rw": ("maxvit_nano_rw_256", MAXVIT),
    "tf": ("maxvit_tiny_tf_224", MAXVIT),
    "rmlp": ("maxvit_rmlp_nano_rw_256", MAXVIT),
    "NCHW": ("maxvit_nano_rw_256", MAXVIT | {"transformer_use_nchw_attn": True}),
    "windows beside a grid": ("maxvit_tiny_pm_256", MAXVIT),
    "grid alone": ("maxxvitv2_nano_rw_256", MAXVIT),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN),
}


def model(key: str, **changes: Any) -> nn.Module:
    name, options = MODELS[key]
    return accelerate(timm.create_model(name, num_classes=3, **options | changes))


def image(network: Any) -> Tensor:
    size = getattr(network, "patch_embed", None)
    return torch.randn(2, 3, *((128, 128) if size is None else size.img_size))


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("key", MODELS)
def test_a_whole_model_is_one_graph(key: str, trains: bool) -> None:
    network = model(key).train(trains)
    x, counter = image(network), CompileCounter()
    with torch.set_grad_enabled(trains):
        torch.manual_seed(1)  # of paths that are dropped
        expected = network(x)
        torch.manual_seed(1)
        actual = torch.compile(network, fullgraph=True, backend=counter)(x)
    assert counter.frame_count == 1
    assert relative_error(actual, expected) < 1e-5


def test_the_page_counts_the_graphs_of_every_model() -> None:
    page = (Path(__file__).parent.parent / "isa_triton" / "models" / "README.md").read_text()
    counted = re.findall(r"^\| `(\w+)`.* \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert [name for name, *_ in counted] == list(dict.fromkeys(name for name, _ in MODELS.values()))
    assert {(evaluation, training) for _, evaluation, training in counted} == {("1", "1")}


@pytest.mark.parametrize("backend", ["auto", "eager"])
@torch.no_grad()
def test_a_compiled_block_takes_maps_that_windows_divide_or_not(backend: str) -> None:
    """Dividing maps are gathered on a CPU, others attend in place: a graph for each, and no more."""
    network: Any = accelerate(model("Swin", dynamic_img_size=True), backend=backend)
    shifted = network.eval().layers[0].blocks[1]
    assert isinstance(shifted, AcceleratedSwinBlock)
    assert shifted.shift_size == (3, 3)
    counter = CompileCounter()
    compiled = torch.compile(shifted, fullgraph=True, dynamic=True, backend=counter)
    for size in ((14, 28), (21, 35), (20, 35), (16, 23), (9, 12), (28, 14), (35, 42), (15, 30)):
        x = torch.randn(2, *size, 16)
        assert relative_error(compiled(x), shifted(x)) < 1e-5
    assert counter.frame_count <= 4
