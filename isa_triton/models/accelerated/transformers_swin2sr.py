"""transformers' Swin2SR (Conde et al., arXiv 2209.11345)."""

from __future__ import annotations

from transformers.models.swin2sr.modeling_swin2sr import Swin2SRAttention, Swin2SRLayer, Swin2SRSelfAttention

from .transformers_windows import AttentionOnMaps, CosineSelfAttentionOnMaps, NormsBehind, family


class Swin2SRSelfAttentionOnMaps(CosineSelfAttentionOnMaps, Swin2SRSelfAttention):
    """`Swin2SRSelfAttention` of maps [B, H, W, C]."""


class Swin2SRAttentionOnMaps(AttentionOnMaps, Swin2SRAttention):
    """`Swin2SRAttention` of maps [B, H, W, C]."""


class AcceleratedSwin2SRLayer(NormsBehind, Swin2SRLayer):
    """`Swin2SRLayer`: windows, shifted or not, of tokens [B, H W, C]."""


FAMILY = family(
    {Swin2SRLayer: AcceleratedSwin2SRLayer},
    {Swin2SRSelfAttention: Swin2SRSelfAttentionOnMaps},
    {Swin2SRAttention: Swin2SRAttentionOnMaps},
)
