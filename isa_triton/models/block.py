"""ISA inside networks of others: a residual block that starts as the identity, put behind any of their modules.

The paper adds one to Mask R-CNN (arXiv 1907.12273, its experiment on COCO); torchvision's is taken as it is.
"""

from __future__ import annotations

from typing import Any, TypeVar, Unpack

from torch import Tensor, nn

from .._tracing import is_proxy
from ..maps import (
    Attends,
    Conv1x1,
    ConvNormReLU,
    PartitionSize,
    check_module,
    check_options,
    check_widths,
    unit_options,
)
from ..modules import InterlacedSparseSelfAttention, ISAOptions

Model = TypeVar("Model", bound=nn.Module)


class ISABlock(Attends):
    """ISA in residual form, x + BN(W ISA(x)), whose batch normalisation starts at zero: the identity at first.

    The non-local block's way into a trained network (Wang et al., arXiv 1711.07971, section 3.3), around ISA.

    Args:
        channels: C, of the map.
        key_channels: K, width of queries and keys.
        value_channels: V, width of values; 256 and 512 are as published.
        partition_size: (P_h, P_w) of both stages.
        **options: order and all options of `InterlacedSparseSelfAttention`; norm_layer must make normalisations that
            learn their scale.

    x [B, C, H, W] -> [B, C, H, W].

    Raises:
        ValueError: a normalisation without a learned scale; else as `InterlacedSparseSelfAttention`.
        TypeError: x is not one feature map.

    Examples:
        >>> block, x = ISABlock(64, 32, 64), torch.randn(2, 64, 13, 20)
        >>> torch.equal(block(x), x)
        True
    """

    def __init__(
        self,
        channels: int,
        key_channels: int = 256,
        value_channels: int = 512,
        *,
        partition_size: PartitionSize = (8, 8),
        **options: Unpack[ISAOptions],
    ) -> None:
        super().__init__()
        check_options(self, options, ISAOptions)
        check_widths(channels=channels, key_channels=key_channels, value_channels=value_channels)
        widths = channels, key_channels, value_channels, value_channels
        self.isa = InterlacedSparseSelfAttention(*widths, partition_size=partition_size, **options)
        linear = unit_options(options) | {"activation": nn.Identity}
        self.output = ConvNormReLU(Conv1x1(value_channels, channels), **linear)
        scale: Any = getattr(self.output.norm, "weight", None)
        if not isinstance(scale, nn.Parameter):
            raise ValueError(f"norm_layer must make a normalisation that learns its scale, got {self.output.norm}")
        nn.init.zeros_(scale)  # not the convolution: batch normalisation divides what is constant by almost nothing

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) and not is_proxy(x):
            raise TypeError(f"x must be one feature map [B, C, H, W], got {type(x).__name__}: follow another module")
        return x + self.output(self.isa(x))


def insert(model: Model, after: str, block: nn.Module) -> Model:
    """Put a block behind a module of a network, in place: what the module returned goes through the block.

    The module and the block become a sequence in the module's place, so the names of its weights get a ".0" and the
    block's a ".1": load what was saved before first.

    Args:
        model: any network, as torchvision's Mask R-CNN, Faster R-CNN and ResNets.
        after: the module's name, as in ``model.named_modules()``: "backbone.body.layer3.4" puts the block before the
            last residual block of stage 3 of a ResNet-50, "backbone.body.layer3" behind the stage.
        block: takes the module's output to the same shape, as `ISABlock` does.

    Returns:
        The model itself.

    Raises:
        TypeError: a block that is no module.
        ValueError: no module of that name.

    Examples:
        >>> model = torchvision.models.detection.maskrcnn_resnet50_fpn()  # doctest: +SKIP
        >>> insert(model, after="backbone.body.layer3.4", block=ISABlock(1024))  # doctest: +SKIP
    """
    check_module("block", block)
    module = find(model, after)
    parent, _, name = after.rpartition(".")
    model.get_submodule(parent).register_module(name, nn.Sequential(module, block).train(module.training))
    return model


def find(model: nn.Module, name: str) -> nn.Module:
    """A module inside a network by its name.

    Args:
        model: any network.
        name: as in ``model.named_modules()``, not empty.

    Raises:
        ValueError: no such module; the message lists those beside which it was sought.

    Examples:
        >>> find(nn.Sequential(nn.Sequential(nn.ReLU())), "0.0")
        ReLU()
    """
    check_module("model", model)
    if not isinstance(name, str):
        raise TypeError(f"after must be the name of a module, got {name!r}")
    module, found = model, ""
    for part in name.split("."):
        children = dict(module.named_children())
        if part not in children:
            where = f"{found!r} of {type(model).__name__}" if found else type(model).__name__
            names = ", ".join(children) or "none"
            raise ValueError(f"after must name a module, got {name!r}: those in {where} are {names}")
        module, found = children[part], f"{found}.{part}".removeprefix(".")
    return module
