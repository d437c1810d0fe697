"""MONAI's Swin UNETR, of images and of volumes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

from bench.models.zoo import Entry, Size

TINY: dict[str, Any] = {"in_chans": 1, "embed_dim": 24, "depths": (2, 2, 1, 1), "num_heads": (3, 6, 6, 6)}


def encoder(spatial_dims: int, window: int, **options: Any) -> nn.Module:
    """What of Swin UNETR attends; convolutions follow it."""
    window_size, patch_size = (window,) * spatial_dims, (2,) * spatial_dims
    return SwinTransformer(window_size=window_size, patch_size=patch_size, spatial_dims=spatial_dims, **TINY, **options)


def maps(size: Size) -> tuple[Tensor]:
    """One volume [D, H, W] or two images [H, W]."""
    return (torch.randn(4 - len(size), 1, *size, dtype=torch.float64),)


def stages(y: list[Tensor]) -> Tensor:
    """All of what a decoder takes."""
    return torch.cat([stage.flatten(1) for stage in y], 1)


def first_stages(y: list[Tensor]) -> Tensor:
    """Of v2: the last maps are of few pixels, of which a normalisation amplifies rounding."""
    return stages(y[:3])


IMAGES = (28, 56), (56, 56), (40, 36)
VOLUMES = (8, 16, 16), (16, 8, 16), (12, 20, 6)  # windows are as long as an axis, or longer: it is not shifted

ENTRIES = (
    Entry("monai", "Swin UNETR, images", partial(encoder, 2, 7), maps, IMAGES, stages),
    Entry("monai", "Swin UNETR, volumes", partial(encoder, 3, 4), maps, VOLUMES, stages),
    Entry("monai", "Swin UNETR v2", partial(encoder, 2, 7, use_v2=True), maps, IMAGES, first_stages, is_graph=False),
)
