"""timm's MaxViT, Swin and SwinV2."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor

from bench.models.zoo import Entry, Size

MAXVIT: dict[str, Any] = {"depths": (1, 1), "embed_dim": (32, 32), "stem_width": 8, "num_classes": 3}
SWIN: dict[str, Any] = {"depths": (2, 2), "embed_dim": 16, "num_heads": (1, 2), "num_classes": 3}
SWIN_V2: dict[str, Any] = {
    "depths": (2, 2), "embed_dim": 24, "num_heads": (3, 6), "num_classes": 3, "strict_img_size": False,
}  # fmt: skip


def image(size: Size) -> tuple[Tensor]:
    return (torch.randn(2, 3, *size, dtype=torch.float64),)


ENTRIES = (
    Entry(
        "timm",
        "MaxViT",
        partial(timm.create_model, "maxvit_nano_rw_256", img_size=128, **MAXVIT),
        image,
        ((64, 64), (128, 64), (128, 128)),  # timm's own refuses what its windows do not divide
    ),
    Entry(
        "timm",
        "Swin",
        partial(timm.create_model, "swin_tiny_patch4_window7_224", dynamic_img_size=True, **SWIN),
        image,
        ((56, 56), (56, 84), (72, 100)),
    ),
    Entry(
        "timm",
        "SwinV2",
        partial(timm.create_model, "swinv2_tiny_window8_256", img_size=(64, 96), **SWIN_V2),
        image,
        ((64, 96), (32, 64), (60, 92)),
    ),
    Entry(
        "timm",
        "SwinV2-CR",
        partial(timm.create_model, "swinv2_cr_tiny_ns_224", img_size=(64, 96), window_size=(8, 8), **SWIN_V2),
        image,
        ((64, 96), (32, 64), (60, 92)),
    ),
)
