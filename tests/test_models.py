"""The paper's networks: what they compute, blocks that begin as the identity, whole checkpoints of mmsegmentation."""

from __future__ import annotations

import copy
import doctest
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import reference
from isa_triton import ISAHead
from isa_triton.inference import fuse
from isa_triton.models.block import ISABlock, insert
from isa_triton.models.ianet import IANet, fcn_head, from_mmseg, ianet, resnet_backbone
from isa_triton.models.resnet import isa_resnet, resnet
from tests.cases import relative_error
from tests.test_checkpoints import P, Published, Weights, batch_norm, head_weights, kernel, published_head

CLASSES, SIZE = 5, (33, 49)  # the map at output stride 8 is 5x7


@pytest.mark.parametrize("name", ["ianet", "block", "resnet"])
def test_examples_in_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"isa_triton.models.{name}"), extraglobs={"torch": torch})
    assert results.failed == 0


def blocks_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ISABlock)]


def trained(block: ISABlock) -> ISABlock:
    """A block that is no longer the identity."""
    nn.init.normal_(block.output.norm.weight)
    return block


# -- segmentation ------------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """A small backbone: maps of 8 and 12 channels in some container."""

    def __init__(self, contain: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 12, 3, 2, 1)])
        self.contain = contain

    def forward(self, x: Tensor) -> Any:
        y = self.stages[0](x)
        return self.contain(y, self.stages[1](y))


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mapping": lambda y, z: {"fine": y, "coarse": z},
    "list": lambda y, z: [y, z],
    "tuple": lambda y, z: (y, z),
}


def small(contain: Callable[[Tensor, Tensor], Any] = CONTAINERS["mapping"], **options: Any) -> IANet:
    head = ISAHead(12, 8, CLASSES, key_channels=4, partition_size=(2, 3), dropout=0.0)
    return IANet(Pyramid(contain), head, fcn_head(8, 4, CLASSES), **options)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("container", CONTAINERS)
def test_logits_are_the_heads_at_the_images_size(container: str, align_corners: bool) -> None:
    net: Any = small(CONTAINERS[container], align_corners=align_corners).eval()
    x = torch.randn(2, 3, *SIZE)
    maps = net.backbone(x)
    deepest = maps["coarse"] if container == "mapping" else maps[1]
    for training in (False, True):
        logits = net.train(training)(x)["out"]
        expected = F.interpolate(net.head(deepest), size=SIZE, mode="bilinear", align_corners=align_corners)
        assert torch.equal(logits, expected)


def test_the_auxiliary_head_is_for_training_and_sees_the_map_before_the_deepest() -> None:
    net: Any = small()
    x = torch.randn(2, 3, *SIZE)
    logits = net(x)
    assert {name: y.shape for name, y in logits.items()} == dict.fromkeys(["out", "aux"], (2, CLASSES, *SIZE))
    logits["aux"].sum().backward()
    reached = {name.split(".")[0] for name, p in net.named_parameters() if p.grad is not None}
    assert reached == {"backbone", "auxiliary"}
    assert net.backbone.stages[1].weight.grad is None
    assert net.eval()(x).keys() == {"out"}


def test_backbones_of_others_and_any_head() -> None:
    x = torch.randn(1, 3, 64, 96)
    backbone = timm.create_model("resnet10t", features_only=True, out_indices=(3, 4))
    ppm = nn.Sequential(reference.PPM(512, 8), nn.Conv2d(8, CLASSES, 1))
    net = IANet(backbone, ppm, fcn_head(256, 8, CLASSES)).eval()
    assert net(x)["out"].shape == (1, CLASSES, 64, 96)
    assert isinstance(ianet(CLASSES, head=ppm).head, nn.Sequential)


@pytest.mark.parametrize(("stride", "maps"), [(8, ((5, 7), (5, 7))), (16, ((3, 4), (3, 4))), (32, ((3, 4), (2, 2)))])
@torch.no_grad()
def test_resnets_stop_striding_where_they_dilate(stride: int, maps: tuple[tuple[int, int], ...]) -> None:
    backbone = resnet_backbone(output_stride=stride).eval()
    y = backbone(torch.randn(1, 3, *SIZE))
    assert [tuple(m.shape) for m in y.values()] == [(1, 1024, *maps[0]), (1, 2048, *maps[1])]


def test_the_published_network() -> None:
    """ResNet-101, dilations 2 and 4 of stages 3 and 4; a stage's first block has what came before."""
    net: Any = ianet(19, name="resnet101")
    stages = {f"layer{i}": [block.conv2.dilation[0] for block in net.backbone[f"layer{i}"]] for i in (1, 2, 3, 4)}
    assert stages == {"layer1": [1] * 3, "layer2": [1] * 4, "layer3": [1] + [2] * 22, "layer4": [2, 4, 4]}
    assert "fc" not in net.backbone
    widths = [m.weight.shape[:2] for m in (net.head.reduce.conv, net.head.isa.branches[0].long_range.key[1].conv)]
    assert widths == [(512, 2048), (256, 256)]
    assert net.auxiliary[0].conv.weight.shape[:2] == (256, 1024)


@torch.no_grad()
def test_options_reach_the_head_and_the_norm_every_layer() -> None:
    net: Any = ianet(
        CLASSES, partition_size=(4, 6), key_channels=16, padding="mask", norm_layer=partial(nn.GroupNorm, 4)
    )
    stage = net.head.isa.branches[0].short_range
    assert (stage.partition_size, stage.padding, stage.key[0].conv.out_channels) == ((4, 6), "mask", 16)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert net(torch.randn(1, 3, *SIZE))["aux"].shape == (1, CLASSES, *SIZE)


@torch.no_grad()
def test_networks_fold_for_inference() -> None:
    net, x = small().double(), torch.randn(2, 3, *SIZE, dtype=torch.float64)
    net(x)  # statistics that are not the initial ones
    assert relative_error(fuse(net)(x)["out"], net.eval()(x)["out"]) < 1e-12


# -- mmsegmentation's ISANet R-50-D8, whole ----------------------------------------------------------------------------

STAGES = ((3, 1, 1), (4, 2, 1), (6, 1, 2), (3, 1, 4))  # blocks, stride, dilation; a first block has half the dilation
STEM = ((0, 1, 2, 3, 32), (3, 4, 1, 32, 32), (6, 7, 1, 32, 64))  # convolution, norm, stride, widths


def mmseg_network() -> Weights:
    """A checkpoint under the names of its ResNetV1c, ISAHead and FCNHead, in fp64."""

    def unit(conv: str, norm: str, out: int, into: int, side: int) -> Weights:
        statistics = batch_norm(norm, out) | {f"{norm}.num_batches_tracked": torch.tensor(7)}
        return {f"{conv}.weight": kernel(out, into, side)} | statistics

    weights: Weights = {}
    for conv, norm, _, into, out in STEM:
        weights |= unit(f"backbone.stem.{conv}", f"backbone.stem.{norm}", out, into, 3)
    into = 64
    for stage, (blocks, _, _) in enumerate(STAGES, 1):
        width = 32 * 2**stage
        for name in (f"backbone.layer{stage}.{i}" for i in range(blocks)):
            if into != 4 * width:
                weights |= unit(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, into, 1)
            for i, (out, c, side) in enumerate(((width, into, 1), (width, width, 3), (4 * width, width, 1)), 1):
                weights |= unit(f"{name}.conv{i}", f"{name}.bn{i}", out, c, side)
            into = 4 * width
    head = head_weights("conv", "bn", "conv_seg", widths=(2048, 512, 256, CLASSES))
    weights |= {f"decode_head.{name}": x for name, x in head.items()}
    weights |= unit("auxiliary_head.convs.0.conv", "auxiliary_head.convs.0.bn", 256, 1024, 3)
    weights["auxiliary_head.conv_seg.weight"] = kernel(CLASSES, 256)
    weights["auxiliary_head.conv_seg.bias"] = torch.randn(CLASSES)
    return {name: x.double() if x.is_floating_point() else x for name, x in weights.items()}


def published_backbone(weights: Weights, x: Tensor) -> list[Tensor]:
    """The four stages' maps of the network in evaluation mode."""

    def unit(conv: str, norm: str, x: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = weights[f"backbone.{conv}.weight"]
        x = F.conv2d(x, weight, None, stride, dilation * (weight.shape[-1] // 2), dilation)
        parts = (weights[f"backbone.{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts)

    for conv, norm, stride, _, _ in STEM:
        x = unit(f"stem.{conv}", f"stem.{norm}", x, stride).relu()
    x, maps = F.max_pool2d(x, 3, 2, 1), []
    for stage, (blocks, stage_stride, stage_dilation) in enumerate(STAGES, 1):
        for i in range(blocks):
            name = f"layer{stage}.{i}"
            stride = stage_stride if i == 0 else 1
            dilation = max(1, stage_dilation // 2) if i == 0 else stage_dilation
            y = unit(f"{name}.conv1", f"{name}.bn1", x).relu()
            y = unit(f"{name}.conv2", f"{name}.bn2", y, stride, dilation).relu()
            y = unit(f"{name}.conv3", f"{name}.bn3", y)
            x = (y + (unit(f"{name}.downsample.0", f"{name}.downsample.1", x, stride) if i == 0 else x)).relu()
        maps.append(x)
    return maps


@torch.no_grad()
def test_a_whole_network_of_mmsegmentation_is_the_same_function() -> None:
    weights, x = mmseg_network(), torch.randn(1, 3, *SIZE, dtype=torch.float64)
    net: Any = ianet(CLASSES, deep_stem=True, partition_size=P).double().eval()
    net.load_state_dict(from_mmseg(weights))
    maps = published_backbone(weights, x)
    for ours, theirs in zip(net.backbone(x).values(), maps[2:], strict=True):
        assert relative_error(ours, theirs) < 1e-11
    head = Published({name.removeprefix("decode_head."): y for name, y in weights.items()})
    logits = published_head(head, maps[3], "conv", "bn", "conv_seg")
    assert relative_error(net(x)["out"], F.interpolate(logits, SIZE, mode="bilinear")) < 1e-11
    aux = Published({name.removeprefix("auxiliary_head."): y for name, y in weights.items()})
    logits = aux.conv("conv_seg", aux.norm("convs.0.bn", aux.conv("convs.0.conv", maps[2])))
    assert relative_error(net.auxiliary(maps[2]), logits) < 1e-11


# -- blocks inside networks of others ----------------------------------------------------------------------------------


def test_a_block_is_x_and_what_isa_adds() -> None:
    block: Any = ISABlock(6, 4, 5, partition_size=(2, 3))
    x = torch.randn(2, 6, 7, 10)
    assert torch.equal(block(x), x)
    y = trained(block)(x)
    scale = block.output.norm.weight[:, None, None]
    normalised = F.batch_norm(block.output.conv(block.isa(x)), None, None, training=True)
    assert relative_error(y, x + scale * normalised) < 1e-6


def test_a_block_learns_from_the_first_step_on() -> None:
    block: Any = ISABlock(6, 4, 5, partition_size=(2, 3))
    x = torch.randn(2, 6, 7, 10)
    before, target = copy.deepcopy(block.state_dict()), torch.randn(2, 6, 7, 10)
    optimiser, losses = torch.optim.SGD(block.parameters(), lr=0.1), []
    for _ in range(3):
        loss = F.mse_loss(block(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(not torch.equal(before[name], p) for name, p in block.named_parameters())


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn"])
@torch.no_grad()
def test_detectors_are_unchanged_by_a_new_block(name: str) -> None:
    random: dict[str, Any] = {"weights": None, "weights_backbone": None}
    few: dict[str, Any] = {"min_size": 48, "max_size": 80, "box_detections_per_img": 3, "rpn_post_nms_top_n_test": 20}
    model = torchvision.models.get_model(name, num_classes=3, **random, **few).eval()
    images = [torch.rand(3, 48, 71), torch.rand(3, 50, 64)]
    expected, features = model(images), model.backbone(images[0][None])
    block = ISABlock(1024, 16, 32)
    assert insert(model, after="backbone.body.layer3.4", block=block) is model
    assert blocks_of(model) == ["backbone.body.layer3.4.1"]
    for ours, theirs in zip(model(images), expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[part], theirs[part]) for part in ours)
    trained(block)
    assert not torch.equal(model.backbone(images[0][None])["2"], features["2"])


@pytest.mark.slow
def test_mask_rcnn_trains_with_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """End to end on generated images: bright rectangles, their boxes and masks. All its weights learn together, then
    those of the block alone, on the proposals of the first step: those of other weights are others, of another loss.
    """
    backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
    )
    model = torchvision.models.detection.MaskRCNN(
        backbone, num_classes=2, min_size=64, max_size=96, box_batch_size_per_image=8, rpn_post_nms_top_n_train=20
    )
    block = ISABlock(256, 16, 32, partition_size=(4, 4))
    insert(model, after="backbone.body.layer3.0", block=block)
    images, targets = [], []
    for top, left, bottom, right in ((10, 20, 40, 70), (5, 8, 50, 33)):
        mask = torch.zeros(64, 90)
        mask[top:bottom, left:right] = 1
        images.append(0.1 * torch.rand(3, 64, 90) + mask)
        boxes = torch.tensor([[left, top, right, bottom]], dtype=torch.float32)
        targets.append({"boxes": boxes, "labels": torch.tensor([1]), "masks": mask[None].to(torch.uint8)})
    select = model.roi_heads.select_training_samples
    selected: list[Any] = []

    def select_once(*args: Any) -> Any:
        if not selected:
            selected.append(select(*args))
        return selected[0]

    def losses(parameters: Iterable[nn.Parameter], lr: float) -> list[float]:
        """Before each of four steps down."""
        optimiser, found = torch.optim.SGD(parameters, lr), []
        for _ in range(4):
            torch.manual_seed(0)  # of the anchors that the proposals' loss is over
            loss = sum(model(images, targets).values())
            found.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return found

    monkeypatch.setattr(model.roi_heads, "select_training_samples", select_once)
    together = losses(model.parameters(), 5e-4)
    assert together == sorted(together, reverse=True)
    assert together[-1] < 0.8 * together[0]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in block.parameters())
    alone = losses(block.parameters(), 0.1)
    assert alone == sorted(alone, reverse=True)
    assert alone[-1] < alone[0] - 1e-4
    (prediction, _) = model.eval()(images)
    assert {"boxes", "labels", "scores", "masks"} == prediction.keys()


def test_blocks_follow_one_another() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
    conv, first, second = model[0], *(trained(ISABlock(6, 4, 5, partition_size=(2, 3))) for _ in range(2))
    x = torch.randn(2, 3, 7, 10)
    insert(insert(model, "0", first), "0", second)
    assert torch.equal(model(x), second(first(conv(x))).relu())
    norm = nn.BatchNorm2d(6)
    insert(model.eval(), "1", norm)
    assert not norm.training


# -- classification ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [(), ("layer3.4",), ("layer3", "layer2.1", "layer3.5")], ids=str)
@torch.no_grad()
def test_classifiers_start_as_the_plain_network(after: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    plain = resnet().eval()
    torch.manual_seed(1)
    model, x = isa_resnet(after=after, key_channels=8, value_channels=16).eval(), torch.randn(2, 3, *SIZE)
    assert torch.equal(model(x), plain(x))
    assert len(blocks_of(model)) == len(after)
    for name in blocks_of(model):
        before = model(x)
        trained(model.get_submodule(name))
        assert not torch.equal(model(x), before)


def test_weights_on_disk_and_another_number_of_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = resnet("resnet18")
    url = torchvision.models.get_weight("ResNet18_Weights.IMAGENET1K_V1").url
    path = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(saved.state_dict(), path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model: Any = isa_resnet(7, name="resnet18", weights="IMAGENET1K_V1", after=("layer4", "layer1.0"))
    assert model.fc.out_features == 7
    assert [model.get_submodule(name).isa.long_range.value.in_channels for name in blocks_of(model)] == [64, 512]
    assert torch.equal(model.layer4[0][0].conv1.weight, saved.layer4[0].conv1.weight)


# -- errors ------------------------------------------------------------------------------------------------------------


def test_without_torchvision_own_backbones_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert small()(torch.randn(1, 3, *SIZE))["out"].shape == (1, CLASSES, *SIZE)
    with pytest.raises(ImportError, match=r"torchvision, an extra: pip install -e '\.\[vision\]'"):
        ianet(CLASSES)


def mistakes() -> Iterator[tuple[Callable[[], Any], type[Exception], str]]:
    x, head = torch.randn(1, 3, 8, 12), nn.Conv2d(3, 2, 1)
    yield lambda: ianet(CLASSES, output_stride=4), ValueError, "output_stride must be one of 8, 16, 32, got 4"
    yield lambda: ianet(CLASSES, name="resnet7"), ValueError, "name must be one of .*'resnet50'.*, got 'resnet7'"
    yield lambda: ianet(CLASSES, name="resnet18"), ValueError, "must be a network with bottlenecks.*got 'resnet18'"
    yield lambda: ianet(CLASSES, deep_stem=True, weights="DEFAULT"), ValueError, "weights must be None with a deep stem"
    yield lambda: ianet(CLASSES, head=head, dropout=0.1), TypeError, "dropout must not be given beside a head"
    yield lambda: IANet(nn.Identity(), head)(x[0]), ValueError, r"x must be images .* got \(3, 8, 12\)"
    yield lambda: IANet(nn.Identity(), head, head)(x), ValueError, "auxiliary must be None"
    yield lambda: IANet(Pyramid(lambda y, z: {"a": None}), head)(x), TypeError, "must return feature maps, got dict"
    yield lambda: insert(head, "0", 3), TypeError, "block must be a torch.nn.Module, got int"
    yield lambda: insert(nn.Sequential(head), "1", head), ValueError, "'1': those in Sequential are 0$"
    yield lambda: insert(nn.Sequential(head), "0.a", head), ValueError, "those in '0' of Sequential are none$"
    yield lambda: insert(head, "", head), ValueError, "after must name a module, got ''"
    frozen = torchvision.ops.FrozenBatchNorm2d
    yield lambda: ISABlock(3, norm_layer=frozen), ValueError, "learns its scale, got FrozenBatchNorm2d"
    yield lambda: ISABlock(3)({"0": x}), TypeError, "must be one feature map .* got dict"
    yield lambda: isa_resnet(after="layer3.4"), ValueError, r"write \('layer3.4',\)"
    yield lambda: isa_resnet(after=("layer3.6",)), ValueError, "those in 'layer3' of ResNet are 0, 1, 2, 3, 4, 5$"
    yield lambda: isa_resnet(after=("maxpool",)), ValueError, "must name residual blocks or stages.*got 'maxpool'"
    heads = {f"decode_head.{name}": y for name, y in head_weights("conv", "bn", "conv_seg").items()}
    yield lambda: from_mmseg(heads | {"neck.0": x}), ValueError, "unexpected: neck.0$"
    yield lambda: from_mmseg({}), ValueError, "holds no mmsegmentation ISAHead"


@pytest.mark.parametrize(("call", "kind", "message"), list(mistakes()))
def test_mistakes_are_named(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()
