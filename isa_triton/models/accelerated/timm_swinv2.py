"""timm's SwinV2 (Liu et al., arXiv 2111.09883), of Microsoft and of C. Reich: cosines, and an MLP's position bias."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import SwinTransformerV2Block, WindowAttention
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock, WindowMultiHeadAttention
from torch import Tensor, nn

from ..._tracing import leaf_of_fx
from ...partition import Partition
from .families import Classes, Family
from .timm import RolledWindows
from .windows import GivenPartitions, cached_bias, project, split


class _CosineAttention(GivenPartitions):
    """What both have in common."""

    attn_drop: nn.Dropout
    proj_drop: nn.Module
    logit_scale: nn.Parameter
    num_heads: int
    cosine = True

    def qkv_of(self, x: Tensor) -> Tensor:
        return project(self.qkv, x)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return split(self.qkv_of(x), self.num_heads)

    def factor(self) -> Tensor:
        return self.logit_scale.clamp(max=math.log(100.0)).exp().flatten()

    def output(self, context: Tensor) -> Tensor:
        return self.proj_drop(project(self.proj, context))

    def dropout_p(self) -> float:
        return self.attn_drop.p


class CosineAttentionOnMaps(_CosineAttention, WindowAttention):
    """SwinV2's `WindowAttention` of maps [B, H, W, C]."""

    qkv: Any
    q_bias: nn.Parameter | None
    k_bias: Tensor
    v_bias: nn.Parameter
    cpb_mlp: nn.Module
    relative_coords_table: Tensor
    relative_position_index: Tensor
    window_size: tuple[int, int]

    def qkv_of(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return project(self.qkv, x)
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        separate = getattr(self, "qkv_bias_separate", False)  # which timm 1.0.3 does not know
        return project(self.qkv, x) + bias if separate else F.linear(x, self.qkv.weight, bias)

    def position_bias(self, partition: Partition) -> Tensor:
        def compute() -> Tensor:
            table = 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads))
            return table[self.relative_position_index].permute(2, 0, 1)  # [heads, tokens, tokens]

        return cached_bias(self, list(self.cpb_mlp.parameters()), compute)


class CosineAttentionOfCrOnMaps(_CosineAttention, WindowMultiHeadAttention):
    """`WindowMultiHeadAttention` of maps [B, H, W, C]."""

    meta_mlp: nn.Module
    _relative_positional_encodings: Any

    def position_bias(self, partition: Partition) -> Tensor:
        return cached_bias(self, list(self.meta_mlp.parameters()), self._relative_positional_encodings)[0]


class AcceleratedSwinV2Block(RolledWindows, SwinTransformerV2Block):
    """`SwinTransformerV2Block`: windows, shifted or not, of maps [B, H, W, C]."""

    forward = leaf_of_fx(SwinTransformerV2Block.forward)

    def _attn(self, x: Tensor) -> Tensor:
        return self.attended(x, super()._attn)


class AcceleratedSwinV2CrBlock(RolledWindows, SwinTransformerV2CrBlock):
    """`SwinTransformerV2CrBlock`: windows, shifted or not, of maps [B, H, W, C]."""

    feat_size: tuple[int, int]
    forward = leaf_of_fx(SwinTransformerV2CrBlock.forward)

    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        return self.attended(x, super()._shifted_window_attn)

    def masked_size(self) -> tuple[int, int]:
        return self.feat_size


_BLOCKS: Classes = {SwinTransformerV2Block: AcceleratedSwinV2Block, SwinTransformerV2CrBlock: AcceleratedSwinV2CrBlock}

FAMILY = Family(
    blocks=_BLOCKS,
    attentions={
        WindowAttention: CosineAttentionOnMaps,
        WindowMultiHeadAttention: CosineAttentionOfCrOnMaps,
    },
    inside=("attn",),
    partly=dict.fromkeys(
        _BLOCKS, "shifted windows in training on a CPU, on maps that timm's masks are for, are timm's"
    ),
    added=("masked_size",),
)
