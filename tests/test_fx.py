"""`torch.fx` traces networks that hold our layers, each of which is one node, without being told anything."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models import GraphExtractNet
from torch import nn
from torch.fx import symbolic_trace
from torchvision.models.feature_extraction import create_feature_extractor

from isa_triton import InterlacedSparseSelfAttention, ISAHead, ISAModule, SelfAttention2d
from isa_triton.inference import fuse
from isa_triton.models import accelerate
from isa_triton.models.ianet import ianet
from isa_triton.models.resnet import isa_resnet
from tests.cases import relative_error

LAYERS = {
    "stage": lambda: SelfAttention2d(5, 4, 6, pattern="columns"),
    "isa": lambda: InterlacedSparseSelfAttention(5, 4, 6, partition_size=(2, 3)),
    "branches": lambda: ISAModule(5, 4, 6, 7, partition_size=((2, 3), (4, 4))),
    "head": lambda: ISAHead(5, 6, 3, key_channels=4, partition_size=(2, 3)),
    "folded": lambda: fuse(ISAHead(5, 6, 3, key_channels=4, partition_size=(2, 3))),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_traced_network_is_the_network_for_any_size(name: str) -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), LAYERS[name]()).eval()
    traced = symbolic_trace(network)
    for size in ((2, 3, 9, 13), (1, 3, 16, 7)):
        x = torch.randn(size)
        assert torch.equal(traced(x), network(x))


def test_a_layer_alone_says_what_to_trace() -> None:
    with pytest.raises(TypeError, match=r"SelfAttention2d is one node to torch\.fx: trace a network that holds it"):
        symbolic_trace(SelfAttention2d(5, 4, 6, pattern="dense"))


@torch.no_grad()
def test_torchvisions_feature_extractor_reads_networks_with_our_blocks() -> None:
    network = isa_resnet(10, name="resnet50", after=("layer3.4",), key_channels=8, value_channels=8).eval()
    extractor = create_feature_extractor(network, {"layer3.4": "block", "layer4": "last"})
    x = torch.randn(1, 3, 64, 96)
    found: dict[str, torch.Tensor] = {}
    network.get_submodule("layer3.4").register_forward_hook(lambda module, args, y: found.update(block=y))
    network.get_submodule("layer4").register_forward_hook(lambda module, args, y: found.update(last=y))
    network(x)
    features = extractor(x)
    assert features.keys() == found.keys()
    assert all(torch.equal(features[name], found[name]) for name in found)


@torch.no_grad()
def test_a_segmentation_network_is_traced() -> None:
    network = ianet(5, name="resnet50", key_channels=8, partition_size=(2, 3)).eval()
    x = torch.randn(1, 3, 33, 49)
    assert torch.equal(symbolic_trace(network)(x)["out"], network(x)["out"])


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")  # paths dropped in training
@pytest.mark.parametrize(
    ("name", "options", "node"),
    [
        ("maxvit_nano_rw_256", {"img_size": 64, "depths": (1, 1, 1, 1)}, "stages.1"),
        ("swin_tiny_patch4_window7_224", {"img_size": 112, "depths": (2, 2, 1, 1)}, "layers.1"),
    ],
)
@torch.no_grad()
def test_extractors_of_timm_and_torchvision_read_accelerated_models(name: str, options: Any, node: str) -> None:
    model = timm.create_model(name, **options).eval()
    x = torch.randn(2, 3, options["img_size"], options["img_size"])
    expected = GraphExtractNet(model, [node])(x)
    accelerate(model)
    for extractor in (GraphExtractNet(model, [node]), create_feature_extractor(model, [node])):
        for batch in (x, x[:1]):
            found = extractor(batch)
            feature = found[node] if isinstance(found, dict) else found  # as torchvision, as timm
            assert relative_error(feature, expected[: len(batch)]) < 1e-5


@torch.no_grad()
def test_layers_compiled_one_by_one_are_counted_by_class() -> None:
    """Dynamo keeps eight compiled frames of a code object: what makes a leaf of each class must not be one for all."""
    for width in range(1, 6):
        layer = SelfAttention2d(5, width, 6, pattern="dense").eval()
        for either in (layer, fuse(layer)):
            torch.compile(either, fullgraph=True, backend="eager")(torch.randn(1, 5, 3, 4))
