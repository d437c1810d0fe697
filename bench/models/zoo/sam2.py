"""SAM 2's Hiera of Meta's package."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sam2.modeling.backbones.hieradet import Hiera
from torch import Tensor

from bench.models.zoo import Entry, Size


def image(size: Size) -> tuple[Tensor]:
    return (torch.randn(2, 3, *size, dtype=torch.float64),)


HIERA: dict[str, Any] = {"embed_dim": 12, "num_heads": 3, "q_pool": 1, "stages": (2, 3), "drop_path_rate": 0.1}

ENTRIES = (
    Entry(
        "sam2",
        "Hiera",
        partial(Hiera, window_spec=(8, 5), global_att_blocks=(3,), **HIERA),
        image,
        ((64, 64), (64, 128), (96, 160)),
        lambda maps: maps[-1] + maps[0].mean(),
    ),
)
