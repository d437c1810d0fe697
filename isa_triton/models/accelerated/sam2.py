"""SAM 2's Hiera (Ravi et al., arXiv 2408.00714) of Meta's package sam2."""

from __future__ import annotations

from typing import Any

from sam2.modeling.backbones.hieradet import MultiScaleAttention, MultiScaleBlock
from torch import Tensor

from ..._tracing import leaf_of_fx
from .families import Family
from .hiera import PARTLY, WindowsOfMaps, attended, pools


class MapMultiScaleAttention(WindowsOfMaps, MultiScaleAttention):
    """`MultiScaleAttention` of windows of maps [B, H, W, C]."""

    number_of_heads = "num_heads"


class AcceleratedMultiScaleBlock(MultiScaleBlock):
    """`MultiScaleBlock` of maps [B, H, W, C]."""

    backend: str
    q_stride: Any
    dim: int
    dim_out: int
    norm1: Any
    norm2: Any
    drop_path: Any
    proj: Any
    mlp: Any

    @leaf_of_fx
    def forward(self, x: Tensor) -> Tensor:
        if pools(self, self.q_stride) or self.dim != self.dim_out:
            return super().forward(x)
        x = x + self.drop_path(attended(self, self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


FAMILY = Family(
    blocks={MultiScaleBlock: AcceleratedMultiScaleBlock},
    attentions={MultiScaleAttention: MapMultiScaleAttention},
    inside=("attn",),
    partly={MultiScaleBlock: PARTLY.format("sam2")},
)
