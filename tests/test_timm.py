"""timm's MaxViT and Swin, accelerated and as they are: the same outputs and gradients, and sizes that timm refuses."""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import timm
import torch
from timm.models.maxxvit import PartitionAttentionCl
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from isa_triton.models import accelerate, restore
from isa_triton.models.accelerated.timm import AcceleratedBlockCl, AcceleratedSwinBlock
from tests.cases import assert_same, outputs_and_gradients, relative_error

MAXVIT: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dim": (32, 32, 64, 64), "stem_width": 16}
SWIN: dict[str, Any] = {"depths": (2, 2), "embed_dim": 16, "num_heads": (1, 2)}  # windows, then shifted ones
MODELS: dict[str, tuple[str, tuple[int, int], dict[str, Any]]] = {  # name, image, options
    "tf: tables of k - q, heads last": ("maxvit_tiny_tf_224", (224, 224), MAXVIT),
    "rw: tables of q - k, heads first": ("maxvit_nano_rw_256", (256, 256), MAXVIT | {"depths": (1, 2, 1, 1)}),
    "rmlp: an MLP of distances": ("maxvit_rmlp_nano_rw_256", (256, 256), MAXVIT),
    "windows beside a grid": ("maxvit_tiny_pm_256", (256, 256), MAXVIT),
    "grid alone, ConvNeXt": ("maxxvitv2_nano_rw_256", (256, 256), MAXVIT),
    "NCHW": ("maxvit_nano_rw_256", (256, 256), MAXVIT | {"transformer_use_nchw_attn": True}),
    "NCHW, heads last": ("maxvit_tiny_tf_224", (224, 224), MAXVIT | {"transformer_use_nchw_attn": True}),
    "no position bias": ("maxvit_nano_rw_256", (256, 256), MAXVIT | {"transformer_rel_pos_type": ""}),
    "Swin: maps of 28x14 and 14x7": ("swin_tiny_patch4_window7_224", (112, 56), SWIN | {"img_size": (112, 56)}),
    "Swin: maps of 18x25 and 9x13": ("swin_tiny_patch4_window7_224", (72, 100), SWIN | {"img_size": (72, 100)}),
    "Swin: windows of 5x4": (
        "swin_tiny_patch4_window7_224", (72, 100), SWIN | {"img_size": (72, 100), "window_size": (5, 4)}
    ),
    "Swin: shifted in small maps too": (
        "swin_tiny_patch4_window7_224", (40, 72), SWIN | {"img_size": (40, 72), "always_partition": True}
    ),
    "Swin: any image": ("swin_tiny_patch4_window7_224", (72, 100), SWIN | {"dynamic_img_size": True}),
}  # fmt: skip

QUICK = "Swin: any image"


def model(key: str) -> tuple[nn.Module, Tensor]:
    """A narrow one of the family in fp64, whose attention depends on positions, and an image for it."""
    name, image, options = MODELS[key]
    network = timm.create_model(name, num_classes=5, **options).eval().double()
    for parameter_name, parameter in network.named_parameters():
        if _of_positions(parameter_name) or ".qkv." in parameter_name:
            nn.init.normal_(parameter, std=0.3)
    return network, torch.randn(1, 3, *image, dtype=torch.float64)


def _of_positions(parameter_name: str) -> bool:
    return "rel_pos" in parameter_name or "relative_position" in parameter_name


def error(actual: Tensor, expected: Tensor) -> float:
    return relative_error(actual, expected, floor=1e-3)  # some gradients are zero


@pytest.mark.parametrize("key", MODELS)
def test_accelerated_models_are_the_same_function(key: str) -> None:
    network, x = model(key)
    expected = outputs_and_gradients(network, x)
    actual = outputs_and_gradients(accelerate(network), x)
    assert any(map(_of_positions, actual)) == (key != "no position bias")
    assert_same(actual, expected, tolerance=1e-9, floor=1e-3)


@pytest.mark.parametrize("key", [QUICK, *(pytest.param(key, marks=pytest.mark.slow) for key in MODELS if key != QUICK)])
@torch.no_grad()
def test_inference_follows_weights_however_they_change(key: str) -> None:
    """Position biases are kept from call to call; also where nobody counts versions, they are those of the weights."""
    network, x = model(key)
    theirs = copy.deepcopy(network)
    for change in (1.0, -0.5):
        for ours_, theirs_ in zip(network.parameters(), theirs.parameters(), strict=True):
            ours_.data.mul_(change)
            theirs_.data.mul_(change)
        expected = theirs(x)
        for backend in ("auto", "auto", "eager"):
            assert error(accelerate(network, backend=backend)(x), expected) < 1e-9
    accelerate(network)
    if not key.startswith("Swin"):  # which timm itself cannot run without images
        assert network(x[:0]).shape == (0, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network.float()(x.float()).isfinite().all()
    assert error(network.float()(x.float()).double(), expected) < 1e-3


TINY: dict[str, Any] = {"depths": (1, 1), "embed_dim": (32, 32), "stem_width": 8, "num_classes": 3}


def tiny(**options: Any) -> nn.Module:
    """Two stages, 4x4 windows and grids for images of 128."""
    return timm.create_model("maxvit_nano_rw_256", img_size=128, **TINY, **options).eval()


def test_accelerating_is_reversible_and_touches_no_weight() -> None:
    network, x = tiny(), torch.randn(1, 3, 128, 128)
    before, state = network(x), copy.deepcopy(network.state_dict())
    assert accelerate(network) is network
    assert any(type(m) is AcceleratedBlockCl for m in network.modules())
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), state.values(), strict=True))
    assert network.state_dict().keys() == state.keys()
    assert restore(network) is network
    assert any(type(m) is PartitionAttentionCl for m in network.modules())
    assert not any(hasattr(m, "backend") for m in network.modules())
    assert torch.equal(network(x), before)
    assert restore(network) is network


@torch.no_grad()
def test_accelerated_models_are_modules_like_others() -> None:
    """Copied, pickled, given another backend, compiled."""
    network, x = accelerate(tiny()), torch.randn(2, 3, 128, 128)
    expected = network(x)
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(x), expected)
    assert error(accelerate(network, backend="eager")(x), expected) < 1e-5
    block = next(m for m in network.modules() if isinstance(m, AcceleratedBlockCl))
    y = torch.randn(1, 9, 13, 32)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert error(compiled(y), block(y)) < 1e-5


@torch.no_grad()
def test_shifted_windows_are_compiled_and_exported() -> None:
    network: Any = accelerate(model("Swin: any image")[0])
    shifted = network.layers[0].blocks[1]
    assert isinstance(shifted, AcceleratedSwinBlock)
    assert shifted.shift_size == (3, 3)
    x, y = torch.randn(2, 1, 20, 35, 16, dtype=torch.float64)
    compiled = torch.compile(shifted, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(shifted, (x,)).module()
    assert error(compiled(y), shifted(y)) < 1e-12
    assert error(exported(y), shifted(y)) < 1e-12


@pytest.mark.parametrize("size", [(128, 168), (104, 136), (40, 72)], ids=str)
@torch.no_grad()
def test_any_size_runs(size: tuple[int, int]) -> None:
    network, x = tiny(), torch.randn(1, 3, *size)
    with pytest.raises(AssertionError, match="divisible"):
        network(x)
    assert accelerate(network)(x).isfinite().all()


@pytest.mark.parametrize("nchw", [False, True])
@pytest.mark.parametrize("size", [(9, 13), (8, 12), (3, 11), (2, 3)], ids=str)
@pytest.mark.parametrize("part", ["block", "grid"])
@torch.no_grad()
def test_attention_is_over_the_real_pixels_of_every_group(nchw: bool, size: tuple[int, int], part: str) -> None:
    """Each window or grid alone, by the formula: softmax(q k^T / sqrt(32) + bias of the distances) v."""
    network: Any = accelerate(tiny(transformer_use_nchw_attn=nchw).double())
    block = getattr(network.stages[0].blocks[0], f"attn_{part}")
    nn.init.normal_(block.attn.rel_pos.relative_position_bias_table)
    x, (H, W), attn = torch.randn(2, *size, 32, dtype=torch.float64), size, block.attn
    bias = attn.rel_pos.get_bias()[0].unflatten(2, (4, 4)).unflatten(1, (4, 4))
    expected = torch.zeros_like(x)
    if part == "block":
        groups = [(slice(y, y + 4), slice(z, z + 4)) for y in range(0, H, 4) for z in range(0, W, 4)]
    else:
        step_h, step_w = -(-H // min(4, H)), -(-W // min(4, W))
        groups = [(slice(y, H, step_h), slice(z, W, step_w)) for y in range(step_h) for z in range(step_w)]
    weights = [w.flatten(1) for w in (attn.qkv.weight, attn.proj.weight)]
    for rows, columns in groups:
        group = x[:, rows, columns]
        h, w = group.shape[1:3]
        q, k, v = nn.functional.linear(group, weights[0], attn.qkv.bias).flatten(1, 2).chunk(3, -1)  # one head
        scores = q @ k.mT * 32**-0.5 + bias[:, :h, :w, :h, :w].reshape(h * w, h * w)
        context = (scores.softmax(-1) @ v).unflatten(1, (h, w))
        expected[:, rows, columns] = nn.functional.linear(context, weights[1], attn.proj.bias)
    ours = block._partition_attn(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if nchw else block._partition_attn(x)
    assert error(ours, expected) < 1e-12


def test_what_cannot_be_accelerated_is_named() -> None:
    with pytest.raises(ValueError, match=r"must hold window attention .* got Linear without any"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"backend must be one of 'auto'.* got 'cuda'"):
        accelerate(tiny(), backend="cuda")


@pytest.mark.parametrize("backend", ["eager", "auto"])
@torch.no_grad()
def test_attention_weights_are_dropped_in_training_alone(backend: str) -> None:
    """Of constant values all weights give the value; of those that are kept, doubled, a number of parts of it."""
    drops = timm.create_model("swin_tiny_patch4_window7_224", dynamic_img_size=True, attn_drop_rate=0.5, **SWIN)
    block: Any = accelerate(drops, backend=backend).layers[0].blocks[0]
    attn = block.attn
    for parameter in attn.parameters():
        parameter.zero_()
    attn.proj.weight.copy_(torch.eye(16))
    attn.qkv.bias[32:] = 1  # the values
    x = torch.randn(2, 14, 21, 16)
    assert error(block.eval()._attn(x), torch.ones_like(x)) < 1e-5
    kept = block.train()._attn(x) * 49 / 2
    assert error(kept, kept.round()) < 1e-4
    assert abs(kept.mean() - 49 / 2) < 0.5
    assert kept.std() > 1


@pytest.mark.parametrize(
    ("name", "any_size"), [("maxvit_tiny_tf_224", True), ("maxvit_pico_rw_256", False)], ids=["tf", "rw"]
)
@torch.no_grad()
def test_image_sizes_are_those_of_timms_own_layers(name: str, any_size: bool) -> None:
    """Windows and grids take any map; what is left is how a family strides and pools."""
    network = accelerate(timm.create_model(name, depths=(1, 1, 1, 1), num_classes=5).eval())
    assert network(torch.randn(1, 3, 96, 160)).isfinite().all()
    x = torch.randn(1, 3, 97, 131)
    if any_size:
        assert network(x).isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="must match the size of tensor"):
            network(x)


@pytest.mark.parametrize("key", ["Swin: maps of 28x14 and 14x7", QUICK])
def test_shifted_windows_in_training_on_a_cpu_are_timms(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With "auto", in training and where windows divide the map; everything else is ours."""
    attended: list[tuple[int, ...]] = []
    theirs = SwinTransformerBlock._attn

    def spy(self: Any, x: Tensor) -> Tensor:
        attended.append(self.shift_size)
        return theirs(self, x)

    monkeypatch.setattr(SwinTransformerBlock, "_attn", spy)
    network: Any = accelerate(model(key)[0])
    shifted = network.layers[0].blocks[1]
    for size, trains, backend in product([(28, 14), (27, 13)], [True, False], ["auto", "eager"]):
        attended.clear()
        accelerate(network, backend=backend)
        with torch.set_grad_enabled(trains):
            shifted(torch.randn(1, *size, 16, dtype=torch.float64))
        assert attended == [(3, 3)] * (trains and backend == "auto" and size == (28, 14))
