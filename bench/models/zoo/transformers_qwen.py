"""The vision tower of Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from bench.models.zoo import Entry, Size


def tower() -> Qwen2_5_VisionTransformerPretrainedModel:
    return Qwen2_5_VisionTransformerPretrainedModel(
        Qwen2_5_VLVisionConfig(
            depth=3, hidden_size=24, intermediate_size=32, num_heads=3, out_hidden_size=20, fullatt_block_indexes=[1]
        )
    )


def patches(size: Size) -> tuple[Tensor, Tensor]:
    """Two videos of T frames, of H x W patches of two pictures each."""
    grid = torch.tensor([size, size])
    return torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14, dtype=torch.float64), grid


def both(y: Any) -> Tensor:
    """The squares, which the language model reads, beside their patches, in the order of windows."""
    return torch.cat([y.pooler_output, y.last_hidden_state.view(len(y.pooler_output), -1)], -1)


SIZES = (1, 16, 24), (1, 4, 6), (3, 18, 10)

# no graph: transformers' own reads sizes of images as numbers
ENTRIES = (Entry("transformers", "Qwen2.5-VL's vision", tower, patches, SIZES, both, is_graph=False),)
