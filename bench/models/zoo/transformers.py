"""transformers' Swin, in all the copies that it has of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    ClapAudioConfig,
    ClapAudioModel,
    DonutSwinConfig,
    DonutSwinModel,
    MaskFormerSwinConfig,
    MaskFormerSwinModel,
    PreTrainedConfig,
    PreTrainedModel,
    Swin2SRConfig,
    Swin2SRForImageSuperResolution,
    SwinConfig,
    SwinModel,
    Swinv2Config,
    Swinv2Model,
)

from bench.models.zoo import Entry, Size

TINY: dict[str, Any] = {"embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6]}
SIZES = (56, 84), (56, 112), (60, 92)  # one window high after the first stage, which is then not shifted


def make(model: type[PreTrainedModel], config: type[PreTrainedConfig], **options: Any) -> nn.Module:
    return model(config(**TINY, **options))


def image(size: Size) -> tuple[Tensor]:
    return (torch.randn(2, 3, *size, dtype=torch.float64),)


def spectrogram(size: Size) -> tuple[Tensor]:
    return (torch.randn(2, 1, *size, dtype=torch.float64),)


def tokens(y: Any) -> Any:
    return y.last_hidden_state


def clap() -> nn.Module:
    """A map of 16 x 16 pixels, whatever is heard, which windows do not divide."""
    config = ClapAudioConfig(
        spec_size=64,
        num_mel_bins=16,
        window_size=6,
        patch_embeds_hidden_size=24,
        hidden_size=48,
        depths=[2, 2],
        num_attention_heads=[3, 6],
        hidden_dropout_prob=0.0,
    )
    return ClapAudioModel(config)


ENTRIES = (
    Entry("transformers", "Swin", partial(make, SwinModel, SwinConfig), image, SIZES, tokens),
    Entry("transformers", "Donut", partial(make, DonutSwinModel, DonutSwinConfig), image, SIZES, tokens),
    Entry(
        "transformers",
        "MaskFormer",
        partial(make, MaskFormerSwinModel, MaskFormerSwinConfig),
        image,
        SIZES,
        tokens,
        is_graph=False,
    ),
    Entry(
        "transformers",
        "SwinV2",
        partial(make, Swinv2Model, Swinv2Config, image_size=(96, 64), window_size=8),
        image,
        ((64, 96), (32, 64), (60, 92)),
        tokens,
    ),
    Entry(
        "transformers",
        "Swin2SR",
        partial(make, Swin2SRForImageSuperResolution, Swin2SRConfig, image_size=16, window_size=4),
        image,
        ((8, 12), (16, 16), (12, 20)),  # transformers itself refuses what its windows do not divide
        lambda y: y.reconstruction,
        is_graph=False,
    ),
    Entry("transformers", "CLAP", clap, spectrogram, ((256, 16), (200, 16), (131, 16)), tokens, is_graph=False),
)
