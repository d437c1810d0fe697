"""timm's Hiera, and that of SAM 2."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor

from bench.models.zoo import Entry, Size

HIERA: dict[str, Any] = {"embed_dim": 12, "num_heads": 3, "stages": (2, 3), "q_pool": 1, "num_classes": 3}


def image(size: Size) -> tuple[Tensor]:
    return (torch.randn(2, 3, *size, dtype=torch.float64),)


ENTRIES = (
    Entry(
        "timm",
        "Hiera",
        partial(timm.create_model, "hiera_tiny_224", img_size=(64, 96), mask_unit_attn=(True, True), **HIERA),
        image,
        ((64, 96),),  # which has one size only
    ),
    Entry(
        "timm",
        "SAM 2",
        partial(timm.create_model, "sam2_hiera_tiny", window_spec=(8, 5), global_att_blocks=(3,), **HIERA),
        image,
        ((64, 64), (64, 128), (96, 160)),
    ),
)
