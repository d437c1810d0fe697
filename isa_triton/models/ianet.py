"""IANet, the paper's segmentation network: a dilated ResNet, the ISA head, and an auxiliary head on stage 3.

arXiv 1907.12273; the backbone is a torchvision ResNet or anything else that returns feature maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import checkpoints
from .._state_dict import find_prefix, plain_tensor, under
from .._tracing import is_proxy
from ..maps import Conv1x1, ConvNormReLU, NormLayer
from ..modules import ISAHead
from ..norm import BatchNorm2d
from .resnet import resnet

_DILATED = {8: (False, True, True), 16: (False, False, True), 32: (False, False, False)}  # stages 2 to 4


class IANet(nn.Module):
    """A segmentation network: backbone, head, and in training an auxiliary head.

    Args:
        backbone: images [B, 3, H, W] -> feature maps [B, C_i, H_i, W_i], the deepest last: a mapping (torchvision), a
            sequence (timm), or one map alone.
        head: the deepest map -> logits [B, num_classes, h, w] of any resolution: `ISAHead`, or any other.
        auxiliary: the map before the deepest -> logits, or None.
        align_corners: of the upsampling to the images; True for networks trained on sizes like 769x769.

    Images [B, 3, H, W] -> {"out": logits [B, num_classes, H, W]}, in training with an auxiliary head also "aux":
    what torchvision's segmentation networks return.

    Raises:
        TypeError: a backbone that returns something else.
        ValueError: images of another shape, or an auxiliary head where the backbone returns one map only.

    Examples:
        >>> net = IANet(nn.Conv2d(3, 64, 3, stride=8, padding=1), ISAHead(64, 32, 19, key_channels=16))
        >>> net(torch.randn(2, 3, 65, 97))["out"].shape
        torch.Size([2, 19, 65, 97])
    """

    def __init__(
        self, backbone: nn.Module, head: nn.Module, auxiliary: nn.Module | None = None, *, align_corners: bool = False
    ) -> None:
        super().__init__()
        self.backbone, self.head, self.auxiliary = backbone, head, auxiliary
        self.align_corners = align_corners

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if not is_proxy(x) and (x.dim() != 4 or 0 in x.shape):
            raise ValueError(f"x must be images [B, 3, H, W] of at least one pixel, got {tuple(x.shape)}")
        maps = feature_maps(self.backbone(x))
        logits = {"out": self.head(maps[-1])}
        if self.training and self.auxiliary is not None:
            if len(maps) < 2:
                raise ValueError("auxiliary must be None where the backbone returns one feature map only")
            logits["aux"] = self.auxiliary(maps[-2])
        return {
            name: F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=self.align_corners)
            for name, y in logits.items()
        }

    def extra_repr(self) -> str:
        return f"align_corners={self.align_corners}"


def feature_maps(output: Any) -> list[Tensor]:
    """What a backbone returned as a list of maps, the deepest last.

    Raises:
        TypeError: no map, no mapping and no sequence of maps.

    Examples:
        >>> [tuple(x.shape) for x in feature_maps({"layer4": torch.zeros(1, 8, 4, 6)})]
        [(1, 8, 4, 6)]
    """
    if isinstance(output, Tensor) or is_proxy(output):
        return [output]
    maps = list(output.values()) if isinstance(output, Mapping) else output
    if not isinstance(maps, (list, tuple)) or not maps or not all(isinstance(y, Tensor) or is_proxy(y) for y in maps):
        raise TypeError(f"backbone must return feature maps, got {type(output).__name__}")
    return list(maps)


def ianet(
    num_classes: int,
    *,
    name: str = "resnet50",
    head: nn.Module | None = None,
    auxiliary: bool = True,
    output_stride: int = 8,
    deep_stem: bool = False,
    weights: Any = None,
    align_corners: bool = False,
    norm_layer: NormLayer = BatchNorm2d,
    **options: Any,
) -> IANet:
    """IANet on a torchvision ResNet: the network of the paper with "resnet101".

    Args:
        num_classes: width of the logits.
        name: of the backbone, see `resnet_backbone`.
        head: takes 2048 channels in place of `ISAHead`.
        auxiliary: whether stage 3 has a head of its own in training.
        output_stride: of the backbone, see `resnet_backbone`.
        deep_stem: see `resnet_backbone`.
        weights: of the backbone, see `resnet_backbone`.
        align_corners: see `IANet`.
        norm_layer: makes a normalisation from its channels, everywhere.
        **options: of `ISAHead`: key_channels, partition_size, dropout, padding and others.

    Raises:
        TypeError: options beside a head.
        ImportError: torchvision is missing.
        ValueError: what `resnet_backbone` or `ISAHead` refuses.

    Examples:
        >>> net = ianet(19, partition_size=(8, 8)).eval()  # doctest: +SKIP
        >>> net(torch.randn(1, 3, 513, 769))["out"].shape  # doctest: +SKIP
        torch.Size([1, 19, 513, 769])
    """
    backbone = resnet_backbone(
        name, output_stride=output_stride, deep_stem=deep_stem, weights=weights, norm_layer=norm_layer
    )
    if head is None:
        head = ISAHead(2048, 512, num_classes, align_corners=align_corners, norm_layer=norm_layer, **options)
    elif options:
        raise TypeError(f"{', '.join(options)} must not be given beside a head: they are options of ISAHead")
    aux = fcn_head(1024, 256, num_classes, norm_layer) if auxiliary else None
    return IANet(backbone, head, aux, align_corners=align_corners)


def resnet_backbone(
    name: str = "resnet50",
    *,
    output_stride: int = 8,
    deep_stem: bool = False,
    weights: Any = None,
    norm_layer: NormLayer = BatchNorm2d,
) -> nn.Module:
    """A torchvision ResNet up to its last map, dilated where it would go on striding.

    Args:
        name: "resnet50", "resnet101" or another of torchvision's with bottlenecks.
        output_stride: 8, as published: stage 3 has dilation 2 and stage 4 dilation 4; 16, stage 4 has 2; or 32.
        deep_stem: three 3x3 convolutions in place of the 7x7 one, as mmsegmentation's "v1c" networks have.
        weights: see `resnet.resnet`; torchvision has none for a deep stem.
        norm_layer: makes a normalisation from its channels.

    Images [B, 3, H, W] -> {"layer3": [B, 1024, h, w], "layer4": [B, 2048, h, w]}; h is H / output_stride, rounded up,
    and w likewise (layer3's stride is 16 where output_stride is 32).

    Raises:
        ImportError: torchvision is missing.
        ValueError: an unknown name or output stride, a network without bottlenecks, or weights for a deep stem.

    Examples:
        >>> resnet_backbone("resnet101")(torch.randn(1, 3, 65, 97))["layer4"].shape  # doctest: +SKIP
        torch.Size([1, 2048, 9, 13])
    """
    if output_stride not in _DILATED:
        raise ValueError(f"output_stride must be one of {', '.join(map(str, _DILATED))}, got {output_stride!r}")
    if deep_stem and weights is not None:
        raise ValueError(f"weights must be None with a deep stem, which torchvision has no weights for, got {weights}")
    dilated = list(_DILATED[output_stride])
    try:
        model = resnet(name, weights=weights, norm_layer=norm_layer, replace_stride_with_dilation=dilated)
    except NotImplementedError as error:  # torchvision's word about residual blocks without a bottleneck
        raise ValueError(f"name must be a network with bottlenecks, as 'resnet50', got {name!r}: {error}") from error
    if deep_stem:
        model.conv1 = _deep_stem(model.bn1.num_features, norm_layer)
    from torchvision.models._utils import IntermediateLayerGetter  # what its own segmentation networks are made with

    return IntermediateLayerGetter(model, {stage: stage for stage in ("layer3", "layer4")})


def _deep_stem(channels: int, norm_layer: NormLayer) -> nn.Sequential:
    """What stands for the first convolution; the network's own normalisation and ReLU follow."""
    half = channels // 2
    return nn.Sequential(
        nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False),
        norm_layer(half),
        nn.ReLU(inplace=True),
        nn.Conv2d(half, half, 3, padding=1, bias=False),
        norm_layer(half),
        nn.ReLU(inplace=True),
        nn.Conv2d(half, channels, 3, padding=1, bias=False),
    )


def fcn_head(
    in_channels: int, channels: int, num_classes: int, norm_layer: NormLayer = BatchNorm2d, dropout: float = 0.1
) -> nn.Sequential:
    """The auxiliary head: conv3x3 + BN + ReLU, dropout of channels, classifier.

    Args:
        in_channels: width of the map.
        channels: width between the convolutions.
        num_classes: width of the logits.
        norm_layer: makes a normalisation from its channels.
        dropout: probability that a channel is dropped in training.

    x [B, in_channels, H, W] -> logits [B, num_classes, H, W].

    Examples:
        >>> fcn_head(64, 16, 19)(torch.randn(2, 64, 9, 13)).shape
        torch.Size([2, 19, 9, 13])
    """
    reduce = ConvNormReLU(nn.Conv2d(in_channels, channels, 3, padding=1, bias=False), norm_layer)
    return nn.Sequential(reduce, nn.Dropout2d(dropout), Conv1x1(channels, num_classes, bias=True))


# Prefixes of mmsegmentation's tensors -> ours, the first that fits; those of the residual blocks are the same.
_MMSEG = {
    "backbone.stem.7.": "backbone.bn1.",
    "backbone.stem.": "backbone.conv1.",
    "backbone.": "backbone.",
    "auxiliary_head.convs.0.conv.": "auxiliary.0.conv.",
    "auxiliary_head.convs.0.bn.": "auxiliary.0.norm.",
    "auxiliary_head.conv_seg.": "auxiliary.2.",
}


def from_mmseg(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights of mmsegmentation's whole ISANet for `ianet`: backbone, ISA head (`checkpoints.from_mmseg`), auxiliary.

    Returns:
        A state_dict that loads strictly into ``ianet(num_classes, deep_stem=True)`` of the checkpoint's depth; with
        ``auxiliary=False`` where it holds no auxiliary head. Networks for 769x769 have ``align_corners=True``.

    Raises:
        TypeError: not a mapping.
        ValueError: not one ISA head called "decode_head.", or tensors of another network.

    Examples:
        >>> weights = from_mmseg(torch.load("isanet_r50-d8.pth")["state_dict"])  # doctest: +SKIP
        >>> ianet(19, deep_stem=True).load_state_dict(weights)  # doctest: +SKIP
    """
    weights = {f"head.{name}": x for name, x in checkpoints.from_mmseg(state_dict).items()}
    landmark = "decode_head.global_relation.value_project.weight"
    root = find_prefix(state_dict, landmark, "network of mmsegmentation with an ISAHead")
    unexpected = []
    for name, x in under(state_dict, root).items():
        theirs = next((prefix for prefix in _MMSEG if name.startswith(prefix)), None)
        if theirs is not None:
            weights[_MMSEG[theirs] + name.removeprefix(theirs)] = plain_tensor(x)
        elif not name.startswith("decode_head."):
            unexpected.append(name)
    if unexpected:
        raise ValueError(f"not the layout of mmsegmentation's ISANet: unexpected: {', '.join(sorted(unexpected))}")
    return weights
