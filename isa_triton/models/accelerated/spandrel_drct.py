"""DRCT (Hsu et al., arXiv 2404.00722) of spandrel."""

from __future__ import annotations

from spandrel.architectures.DRCT.__arch.drct_arch import SwinTransformerBlock, WindowAttention

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
