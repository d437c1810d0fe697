"""transformers' CLAP: Swin of a spectrogram, folded into a map."""

from __future__ import annotations

from transformers.models.clap.modeling_clap import ClapAudioAttention, ClapAudioLayer, ClapAudioSelfAttention

from .transformers_windows import AttentionOnMaps, ClampedWindows, SelfAttentionOnMaps, family


class ClapAudioSelfAttentionOnMaps(SelfAttentionOnMaps, ClapAudioSelfAttention):
    """`ClapAudioSelfAttention` of maps [B, H, W, C]."""


class ClapAudioAttentionOnMaps(AttentionOnMaps, ClapAudioAttention):
    """`ClapAudioAttention` of maps [B, H, W, C]."""


class AcceleratedClapAudioLayer(ClampedWindows, ClapAudioLayer):
    """`ClapAudioLayer`: windows, shifted or not, of tokens [B, H W, C]."""


FAMILY = family(
    {ClapAudioLayer: AcceleratedClapAudioLayer},
    {ClapAudioSelfAttention: ClapAudioSelfAttentionOnMaps},
    {ClapAudioAttention: ClapAudioAttentionOnMaps},
)
