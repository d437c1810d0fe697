"""ResNet classifiers with ISA blocks at chosen depths: the paper's experiment on CUB-200-2011 (arXiv 1907.12273)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from torch import nn

from .._extras import install
from ..maps import PartitionSize
from ..modules import ISAOptions
from .block import ISABlock, find, insert


def isa_resnet(
    num_classes: int = 1000,
    *,
    name: str = "resnet50",
    after: Sequence[str] = ("layer3.4",),
    weights: Any = None,
    key_channels: int = 256,
    value_channels: int = 512,
    partition_size: PartitionSize = (8, 8),
    **options: Unpack[ISAOptions],
) -> nn.Module:
    """A torchvision ResNet with an ISA block behind each of some residual blocks; at first it computes what it did.

    Args:
        num_classes: width of the logits; where the weights have another number, the classifier starts anew.
        name: of the network in torchvision.
        after: names of residual blocks or stages, as the plain network has them: "layer3.4" is the fifth block of
            stage 3, and what follows it is the last one, before which the non-local paper puts its block; () is the
            plain network.
        weights: see `resnet`.
        key_channels: of `ISABlock`.
        value_channels: of `ISABlock`.
        partition_size: of `ISABlock`.
        **options: of `ISABlock`; norm_layer is the whole network's.

    Images [B, 3, H, W] -> logits [B, num_classes].

    Raises:
        ImportError: torchvision is missing.
        ValueError: an unknown name, or what `ISABlock` refuses.

    Examples:
        >>> model = isa_resnet(200, after=("layer2.2", "layer3.2", "layer3.4"))  # doctest: +SKIP
        >>> model(torch.randn(1, 3, 448, 448)).shape  # doctest: +SKIP
        torch.Size([1, 200])
    """
    if isinstance(after, str):
        raise ValueError(f"after must be a sequence of names, got the name {after!r}: write ({after!r},)")
    model = resnet(name, weights=weights, norm_layer=options.get("norm_layer"))
    if num_classes != model.fc.out_features:
        model.fc = nn.Linear(model.fc.in_features, num_classes)
    for place in sorted(after, reverse=True):  # inside a stage first, and names outside stay what they were
        widths = out_channels(find(model, place), place), key_channels, value_channels
        insert(model, place, ISABlock(*widths, partition_size=partition_size, **options))
    return model


def out_channels(module: nn.Module, name: str) -> int:
    """The width of a residual block or of a stage of them: that of its last convolution.

    Raises:
        ValueError: a module without convolutions; `name` says which.

    Examples:
        >>> out_channels(nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 64, 1)), "layer1")
        64
    """
    widths = [m.out_channels for m in module.modules() if isinstance(m, nn.Conv2d)]
    if not widths:
        raise ValueError(f"after must name residual blocks or stages, as 'layer3.4' or 'layer3', got {name!r}")
    return widths[-1]


def resnet(name: str = "resnet50", *, weights: Any = None, **options: Any) -> Any:
    """A ResNet of torchvision.

    Args:
        name: "resnet50", "resnet101", or any other that ``torchvision.models.resnet`` has.
        weights: None for random ones, or torchvision's, as "IMAGENET1K_V2": they are read from the folder of
            ``torch.hub``, and downloaded where they are not there.
        **options: of ``torchvision.models.ResNet``.

    Raises:
        ImportError: torchvision is missing.
        ValueError: no such network.

    Examples:
        >>> resnet("resnet50").fc.in_features  # doctest: +SKIP
        2048
    """
    try:
        from torchvision import models
    except ImportError as error:
        raise ImportError(f"ResNets come from torchvision, an extra: {install('vision')}") from error
    names = [known for known in models.list_models(module=models) if hasattr(models.resnet, known)]
    if name not in names:
        raise ValueError(f"name must be one of {', '.join(map(repr, names))}, got {name!r}")
    return models.get_model(name, weights=weights, **options)
