"""transformers' Swin of Donut."""

from __future__ import annotations

from transformers.models.donut.modeling_donut_swin import DonutSwinAttention, DonutSwinLayer, DonutSwinSelfAttention

from .transformers_windows import AttentionOnMaps, ClampedWindows, SelfAttentionOnMaps, family


class DonutSwinSelfAttentionOnMaps(SelfAttentionOnMaps, DonutSwinSelfAttention):
    """`DonutSwinSelfAttention` of maps [B, H, W, C]."""


class DonutSwinAttentionOnMaps(AttentionOnMaps, DonutSwinAttention):
    """`DonutSwinAttention` of maps [B, H, W, C]."""


class AcceleratedDonutSwinLayer(ClampedWindows, DonutSwinLayer):
    """`DonutSwinLayer`: windows, shifted or not, of tokens [B, H W, C]."""


FAMILY = family(
    {DonutSwinLayer: AcceleratedDonutSwinLayer},
    {DonutSwinSelfAttention: DonutSwinSelfAttentionOnMaps},
    {DonutSwinAttention: DonutSwinAttentionOnMaps},
)
