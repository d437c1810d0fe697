"""transformers' Hiera, and that of its SAM 2."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import HieraConfig, HieraModel, Sam2HieraDetConfig
from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModel

from bench.models.zoo import Entry, Size


def image(size: Size) -> tuple[Tensor]:
    return (torch.randn(2, 3, *size, dtype=torch.float64),)


def sam2() -> Sam2HieraDetModel:
    return Sam2HieraDetModel(
        Sam2HieraDetConfig(
            hidden_size=12,
            image_size=[64, 64],
            blocks_per_stage=[2, 3],
            embed_dim_per_stage=[12, 24],
            num_attention_heads_per_stage=[3, 6],
            window_size_per_stage=[8, 5],
            global_attention_blocks=[3],
            num_query_pool_stages=1,
        )
    )


def hiera() -> HieraModel:
    config = HieraConfig(
        embed_dim=12,
        image_size=[64, 96],
        depths=[2, 2],
        num_heads=[3, 6],
        num_query_pool=1,
        masked_unit_size=[4, 4],
        masked_unit_attention=[True, True],
    )
    return HieraModel(config)


ENTRIES = (
    Entry("transformers", "SAM 2", sam2, image, ((64, 64), (64, 128), (96, 160)), lambda y: y.last_hidden_state),
    Entry("transformers", "Hiera", hiera, image, ((64, 96),), lambda y: y.last_hidden_state),  # which has one size only
)
