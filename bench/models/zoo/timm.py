"""timm's MaxViT and Swin."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor

from bench.models.zoo import Entry, Size

MAXVIT: dict[str, Any] = {"depths": (1, 1), "embed_dim": (32, 32), "stem_width": 8, "num_classes": 3}
SWIN: dict[str, Any] = {"depths": (2, 2), "embed_dim": 16, "num_heads": (1, 2), "num_classes": 3}


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
)
