"""SwinIR (Liang et al., arXiv 2108.10257) of spandrel."""

from __future__ import annotations

from spandrel.architectures.SwinIR.__arch.SwinIR import SwinTransformerBlock, WindowAttention

from .families import Family
from .restoration import PARTLY, TokenBlock, WindowsOfMaps


class MapWindowAttention(WindowsOfMaps, WindowAttention):
    """`WindowAttention` of maps [B, H, W, C]."""


class AcceleratedSwinTransformerBlock(TokenBlock, SwinTransformerBlock):
    """`SwinTransformerBlock` of tokens [B, H W, C]."""


FAMILY = Family(
    blocks={SwinTransformerBlock: AcceleratedSwinTransformerBlock},
    attentions={WindowAttention: MapWindowAttention},
    inside=("attn",),
    partly={SwinTransformerBlock: PARTLY},
)
