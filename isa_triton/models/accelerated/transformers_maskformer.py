"""transformers' Swin of MaskFormer."""

from __future__ import annotations

from transformers.models.maskformer.modeling_maskformer_swin import (
    MaskFormerSwinAttention,
    MaskFormerSwinLayer,
    MaskFormerSwinSelfAttention,
)

from .transformers_windows import AttentionOnMaps, FixedWindows, SelfAttentionOnMaps, family


class MaskFormerSwinSelfAttentionOnMaps(SelfAttentionOnMaps, MaskFormerSwinSelfAttention):
    """`MaskFormerSwinSelfAttention` of maps [B, H, W, C]."""


class MaskFormerSwinAttentionOnMaps(AttentionOnMaps, MaskFormerSwinAttention):
    """`MaskFormerSwinAttention` of maps [B, H, W, C]."""


class AcceleratedMaskFormerSwinLayer(FixedWindows, MaskFormerSwinLayer):
    """`MaskFormerSwinLayer`: windows, shifted or not, of tokens [B, H W, C]."""


FAMILY = family(
    {MaskFormerSwinLayer: AcceleratedMaskFormerSwinLayer},
    {MaskFormerSwinSelfAttention: MaskFormerSwinSelfAttentionOnMaps},
    {MaskFormerSwinAttention: MaskFormerSwinAttentionOnMaps},
)
