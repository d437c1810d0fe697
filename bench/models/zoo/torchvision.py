"""torchvision's Swin, SwinV2, video Swin and MaxViT."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.video.swin_transformer import SwinTransformer3d

from bench.models.zoo import Entry, Size

TINY: dict[str, Any] = {"embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "num_classes": 3}


def images(size: Size) -> tuple[Tensor]:
    """Three maps of an image [H, W] or of a video [T, H, W]."""
    return (torch.randn(3, 3, *size, dtype=torch.float64),)


def swin_v2() -> nn.Module:
    return SwinTransformer(
        [4, 4], window_size=[8, 8], block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2, **TINY
    )


def max_vit() -> nn.Module:
    """Maps of 28 x 28 and of 14 x 14 pixels, which windows divide."""
    return MaxVit((112, 112), 8, 7, [24, 24], [1, 1], 8, 0.1, num_classes=3)


ENTRIES = (
    Entry(
        "torchvision",
        "Swin",
        partial(SwinTransformer, [4, 4], window_size=[7, 7], **TINY),
        images,
        ((56, 84), (28, 56), (60, 92)),  # one window high in the second
    ),
    Entry("torchvision", "SwinV2", swin_v2, images, ((64, 96), (32, 64), (60, 92))),
    Entry(
        "torchvision",
        "Swin3d",
        partial(SwinTransformer3d, [2, 4, 4], window_size=[8, 7, 7], **TINY),
        images,
        ((4, 28, 56), (20, 56, 28), (9, 30, 36)),
    ),
    Entry("torchvision", "MaxViT", max_vit, images, ((112, 112),)),  # torchvision's own takes one size
)
