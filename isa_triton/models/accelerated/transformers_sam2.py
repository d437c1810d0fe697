"""SAM 2's Hiera (Ravi et al., arXiv 2408.00714) of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleAttention, Sam2MultiScaleBlock

from ..._tracing import leaf_of_fx
from .families import Family
from .hiera import PARTLY, WindowsOfMaps, attended, pools


class MapSam2MultiScaleAttention(WindowsOfMaps, Sam2MultiScaleAttention):
    """`Sam2MultiScaleAttention` of windows of maps [B, H, W, C]."""

    number_of_heads = "num_attention_heads"


class AcceleratedSam2MultiScaleBlock(Sam2MultiScaleBlock):
    """`Sam2MultiScaleBlock` of maps [B, H, W, C]."""

    backend: str
    query_stride: Any
    dim: int
    dim_out: int
    layer_norm1: Any
    layer_norm2: Any
    mlp: Any

    @leaf_of_fx
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        if pools(self, self.query_stride) or self.dim != self.dim_out:
            y: Tensor = super().forward(hidden_states, **kwargs)
            return y
        x = hidden_states + attended(self, self.layer_norm1(hidden_states))
        return x + self.mlp(self.layer_norm2(x))


FAMILY = Family(
    blocks={Sam2MultiScaleBlock: AcceleratedSam2MultiScaleBlock},
    attentions={Sam2MultiScaleAttention: MapSam2MultiScaleAttention},
    inside=("attn",),
    partly={Sam2MultiScaleBlock: PARTLY.format("transformers")},
)
