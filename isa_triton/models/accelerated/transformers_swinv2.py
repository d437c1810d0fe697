"""transformers' SwinV2 (Liu et al., arXiv 2111.09883)."""

from __future__ import annotations

from transformers.models.swinv2.modeling_swinv2 import Swinv2Attention, Swinv2Layer, Swinv2SelfAttention

from .transformers_windows import AttentionOnMaps, CosineSelfAttentionOnMaps, NormsBehind, family


class Swinv2SelfAttentionOnMaps(CosineSelfAttentionOnMaps, Swinv2SelfAttention):
    """`Swinv2SelfAttention` of maps [B, H, W, C]."""


class Swinv2AttentionOnMaps(AttentionOnMaps, Swinv2Attention):
    """`Swinv2Attention` of maps [B, H, W, C]."""


class AcceleratedSwinv2Layer(NormsBehind, Swinv2Layer):
    """`Swinv2Layer`: windows, shifted or not, of tokens [B, H W, C]."""


FAMILY = family(
    {Swinv2Layer: AcceleratedSwinv2Layer},
    {Swinv2SelfAttention: Swinv2SelfAttentionOnMaps},
    {Swinv2Attention: Swinv2AttentionOnMaps},
)
