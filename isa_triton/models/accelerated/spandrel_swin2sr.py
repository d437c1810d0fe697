"""Swin2SR (Conde et al., arXiv 2209.11345) of spandrel: cosine attention, norms behind."""

from __future__ import annotations

from typing import Any

from spandrel.architectures.Swin2SR.__arch.Swin2SR import SwinTransformerBlock, WindowAttention
from torch import Tensor

from ..._tracing import leaf_of_fx
from .families import Family
from .restoration import PARTLY, CosineWindowsOfMaps, SquareWindows


class MapWindowAttention(CosineWindowsOfMaps, WindowAttention):
    """`WindowAttention` of maps [B, H, W, C]."""


class AcceleratedSwinTransformerBlock(SquareWindows, SwinTransformerBlock):
    """`SwinTransformerBlock` of tokens [B, H W, C]."""

    norm1: Any
    norm2: Any
    drop_path: Any
    mlp: Any

    @leaf_of_fx
    def forward(self, x: Tensor, x_size: tuple[int, int]) -> Tensor:
        if self.is_theirs(x):
            return super().forward(x, x_size)
        x = x + self.drop_path(self.norm1(self.attended(x, x_size)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


FAMILY = Family(
    blocks={SwinTransformerBlock: AcceleratedSwinTransformerBlock},
    attentions={WindowAttention: MapWindowAttention},
    inside=("attn",),
    partly={SwinTransformerBlock: PARTLY},
)
