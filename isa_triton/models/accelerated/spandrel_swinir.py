"""SwinIR (Liang et al., arXiv 2108.10257) of spandrel."""

from __future__ import annotations

from typing import Any

from spandrel.architectures.SwinIR.__arch.SwinIR import SwinTransformerBlock, WindowAttention
from torch import Tensor

from ..._tracing import leaf_of_fx
from .families import Family
from .restoration import PARTLY, SquareWindows, WindowsOfMaps


class MapWindowAttention(WindowsOfMaps, WindowAttention):
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
        x = x + self.drop_path(self.attended(self.norm1(x), x_size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


FAMILY = Family(
    blocks={SwinTransformerBlock: AcceleratedSwinTransformerBlock},
    attentions={WindowAttention: MapWindowAttention},
    inside=("attn",),
    partly={SwinTransformerBlock: PARTLY},
)
