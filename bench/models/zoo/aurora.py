"""Aurora's backbone, a U-Net of 3-D Swin blocks, with adapters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from aurora.model.swin3d import BasicLayer3D, Swin3DTransformerBackbone
from torch import Tensor

from bench.models.zoo import Entry, Size

TINY: dict[str, Any] = {
    "embed_dim": 24,
    "encoder_depths": (2, 2),
    "encoder_num_heads": (3, 3),
    "decoder_depths": (2, 2),
    "decoder_num_heads": (3, 3),
    "window_size": (2, 3, 4),
    "use_lora": True,
}


def atmosphere(size: Size) -> tuple[Tensor, Tensor, int, Size]:
    """Two states of the air on levels x latitudes x longitudes, the second step of a roll-out."""
    tokens = torch.randn(2, size[0] * size[1] * size[2], TINY["embed_dim"], dtype=torch.float64)
    return tokens, torch.tensor([6.0, 12.0], dtype=torch.float64), 1, size


def air(size: Size) -> tuple[Tensor, Tensor, Size]:
    return atmosphere(size)[0], torch.randn(2, 24, dtype=torch.float64), size


ENTRIES = (
    Entry(
        "aurora",
        "Swin3D",
        partial(Swin3DTransformerBackbone, **TINY),
        atmosphere,
        ((4, 12, 16), (2, 6, 8), (4, 7, 10)),  # of the second, no window is shifted in the second stage
        is_graph=False,  # the time embedding looks at values
    ),
    Entry(
        "aurora",
        "layer",
        partial(BasicLayer3D, 24, 2, 3, (2, 3, 4), 24, use_lora=True),
        air,
        ((4, 6, 8), (2, 6, 16), (4, 7, 10)),
        lambda y: y[0],
    ),
)
