"""torchvision's Swin, SwinV2, video Swin and MaxViT, accelerated, and Swin in a detector."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from bench.models.exact import network, typed
from isa_triton.models import accelerate, report
from tests.accelerated_models import zoo

ENTRIES = zoo("torchvision")


def test_a_graph_that_has_no_block_left_says_so() -> None:
    traced = torch.fx.symbolic_trace(network(ENTRIES[0]))
    with pytest.raises(ValueError, match=r"without any; a graph of torch.fx .*: accelerate what it is traced from"):
        accelerate(traced)


def test_is_averaged_and_distributed(tmp_path: Path) -> None:
    """What wraps a network of torchvision's wraps an accelerated one: averaged weights, and data parallel training."""
    entry = ENTRIES[0]
    model, (x,) = accelerate(network(entry, torch.float32)), typed(entry.inputs(entry.sizes[0]), torch.float32)
    average = AveragedModel(model)
    average.update_parameters(model)
    assert sum(found.taken for found in report(average)) == 4
    assert torch.equal(average(x), model(x))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(model)
        parallel(x).sum().backward()
    finally:
        dist.destroy_process_group()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("as_graph", [False, True], ids=["layers", "graph"])
def test_blocks_in_a_detector_are_taken(as_graph: bool) -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    feature_extraction = pytest.importorskip("torchvision.models.feature_extraction")
    utils = pytest.importorskip("torchvision.models._utils")

    class Backbone(nn.Module):
        """The stages of Swin as maps [B, C, H, W]."""

        out_channels = 32

        def __init__(self, swin: nn.Module) -> None:
            super().__init__()
            if as_graph:
                self.stages = feature_extraction.create_feature_extractor(swin, {"features.3": "0"})
            else:
                self.stages = utils.IntermediateLayerGetter(swin.features, {"3": "0"})

        def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
            return OrderedDict((name, y.permute(0, 3, 1, 2)) for name, y in self.stages(x).items())

    def detector(swin: nn.Module) -> Any:
        torch.manual_seed(0)
        anchors = detection.rpn.AnchorGenerator(sizes=((16, 32),), aspect_ratios=((1.0,),))
        return detection.FasterRCNN(
            Backbone(swin), 3, min_size=60, max_size=92, rpn_anchor_generator=anchors, rpn_pre_nms_top_n_test=20
        ).double()

    swin = network(ENTRIES[0])
    theirs = detector(copy.deepcopy(swin))
    ours = detector(accelerate(swin, backend="eager")) if as_graph else accelerate(detector(swin), backend="eager")
    if as_graph:
        called = [node for node in ours.backbone.stages.graph.nodes if node.op == "call_module"]
        assert sum(".attn" in node.target for node in called) == 4
    images = [torch.rand(3, 60, 92, dtype=torch.float64)]
    targets = [{"boxes": torch.tensor([[8.0, 8, 40, 40]], dtype=torch.float64), "labels": torch.tensor([1])}]
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    losses = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(1)
        losses.append(model(images, targets))
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("block", "backend"), [(0, "auto"), (0, "eager"), (1, "eager")])
def test_attention_weights_are_dropped_as_often_as_by_torchvision(block: int, backend: str) -> None:
    theirs: Any = network(ENTRIES[0]).get_submodule(f"features.1.{block}.attn")
    theirs.attention_dropout = 0.3
    ours = accelerate(copy.deepcopy(theirs), backend=backend)
    x, n = torch.randn(1, 14, 14, 16, dtype=torch.float64), 400
    torch.manual_seed(0)
    with torch.no_grad():
        expected = ours(x)[0]
        actual, of_theirs = (model.train()(x.expand(n, -1, -1, -1)) for model in (ours, theirs))
    deviation = of_theirs.std(0)
    assert ((actual.mean(0) - expected).abs() < 6 * deviation / n**0.5).all()
    assert abs(float(actual.std(0).mean() / deviation.mean()) - 1) < 0.02
