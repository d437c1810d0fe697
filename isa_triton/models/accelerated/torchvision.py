"""torchvision's Swin, SwinV2, video Swin and MaxViT: windows, shifted or not, and grids.

Swin (Liu et al., arXiv 2103.14030), SwinV2 with cosine attention (arXiv 2111.09883), video Swin (arXiv 2106.13230):
maps [B, H, W, C] and videos [B, T, H, W, C]. Where windows do not divide them there are zeros behind them, which are
attended; an axis that one window covers is not shifted. MaxViT (arXiv 2204.01697): maps [B, C, H, W] of one size.
"""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.maxvit import PartitionAttentionLayer, RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from ..._tracing import is_plain, leaf_of_fx
from ...axis import grid, local
from ...maps import at_most
from ...partition import Partition
from .families import Family
from .windows import (
    GivenPartitions,
    OnMaps,
    attend,
    cached_bias,
    gathers,
    in_windows,
    project,
    shift_of,
    split,
    trains_faster_theirs,
)


class _InWindows(OnMaps):
    """What all of them have in common; they read weights and call no layer, and so does this."""

    backend: str
    window_size: list[int]
    shift_size: list[int]
    num_heads: int
    attention_dropout: float
    dropout: float
    training: bool
    qkv: Any
    proj: Any
    relative_position_bias_table: nn.Parameter
    get_relative_position_bias: Any

    def in_windows(self, x: Tensor, theirs: Any) -> Tensor:
        window = self.window(x)
        shift = shift_of(x, window, self.shift_size)
        of_image = len(shift) == 2  # the mask of a video is dear
        if any(shift) and (gathers(x, self.backend) if of_image else trains_faster_theirs(x, self.backend)):
            return theirs(x)
        return in_windows(x, window, shift, lambda x, partition: attend(self, x, partition, self.backend))

    def window(self, x: Tensor) -> list[int]:
        return self.window_size

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return split(F.linear(x, self.qkv.weight, self.qkv.bias), self.num_heads)

    def output(self, context: Tensor) -> Tensor:
        return F.dropout(F.linear(context, self.proj.weight, self.proj.bias), self.dropout, self.training)

    def dropout_p(self) -> float:
        return self.attention_dropout

    def position_bias(self, partition: Partition) -> Tensor:
        return cached_bias(self, [self.relative_position_bias_table], self.get_relative_position_bias)[0]


class AcceleratedShiftedWindowAttention(_InWindows, ShiftedWindowAttention):
    """`ShiftedWindowAttention` of maps [B, H, W, C]."""

    @leaf_of_fx
    def forward(self, x: Tensor) -> Tensor:
        return self.in_windows(x, super().forward)


class AcceleratedShiftedWindowAttentionV2(_InWindows, ShiftedWindowAttentionV2):
    """`ShiftedWindowAttentionV2` of maps [B, H, W, C]: cosine attention, an MLP's position bias."""

    cpb_mlp: nn.Module
    logit_scale: nn.Parameter
    cosine = True

    @leaf_of_fx
    def forward(self, x: Tensor) -> Tensor:
        return self.in_windows(x, super().forward)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        bias = self.qkv.bias
        if bias is not None:  # there is none of keys
            bias = bias * bias.new_tensor([1, 0, 1]).repeat_interleave(bias.shape[0] // 3)
        return split(F.linear(x, self.qkv.weight, bias), self.num_heads)

    def factor(self) -> Tensor:
        return self.logit_scale.clamp(max=math.log(100.0)).exp().flatten()

    def position_bias(self, partition: Partition) -> Tensor:
        return cached_bias(self, list(self.cpb_mlp.parameters()), self.get_relative_position_bias)[0]


class AcceleratedShiftedWindowAttention3d(_InWindows, ShiftedWindowAttention3d):
    """`ShiftedWindowAttention3d` of videos [B, T, H, W, C]."""

    @leaf_of_fx
    def forward(self, x: Tensor) -> Tensor:
        return self.in_windows(x, super().forward)

    def window(self, x: Tensor) -> list[int]:
        return list(map(at_most, self.window_size, x.shape[1:4]))

    def position_bias(self, partition: Partition) -> Tensor:
        window = [axis.tokens for axis in partition]

        def compute() -> Tensor:
            return self.get_relative_position_bias(window)

        return cached_bias(self, [self.relative_position_bias_table], compute, window)[0]


class MaxVitAttentionOnMaps(GivenPartitions, RelativePositionalMultiHeadAttention):
    """`RelativePositionalMultiHeadAttention` of maps [B, H, W, C]."""

    n_heads: int
    scale_factor: float
    size: int
    to_qkv: nn.Module
    merge: nn.Module
    relative_position_bias_table: nn.Parameter
    get_relative_positional_bias: Any

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return split(project(self.to_qkv, x), self.n_heads)

    def factor(self) -> float:
        return self.scale_factor

    def output(self, context: Tensor) -> Tensor:
        return project(self.merge, context)

    def position_bias(self, partition: Partition) -> Tensor:
        window = self.size, self.size
        return cached_bias(self, [self.relative_position_bias_table], self.get_relative_positional_bias, window)[0]


class AcceleratedPartitionAttentionLayer(PartitionAttentionLayer):
    """`PartitionAttentionLayer`: windows or a grid of maps [B, C, H, W]."""

    backend: str
    attn_layer: nn.Sequential
    mlp_layer: nn.Module
    stochastic_dropout: nn.Module
    partition_type: str
    grid_size: tuple[int, int]
    p: int

    @leaf_of_fx
    def forward(self, x: Tensor) -> Any:
        size, is_known = tuple(x.shape[2:]), is_plain(self.attn_layer, nn.Sequential) and len(self.attn_layer) == 3
        if gathers(x, self.backend) or size != tuple(self.grid_size) or not is_known:
            return super().forward(x)
        if self.partition_type == "window":
            partition = Partition(*(local(extent, self.p) for extent in size))
        else:
            partition = Partition(*(grid(extent, extent // self.p) for extent in size))
        norm, attn, dropout = self.attn_layer
        x = x.permute(0, 2, 3, 1)
        x = x + self.stochastic_dropout(dropout(attn(norm(x), partition=partition, backend=self.backend)))
        x = x + self.stochastic_dropout(self.mlp_layer(x))
        return x.permute(0, 3, 1, 2)


_PARTLY = "shifted windows on a CPU are torchvision's"

FAMILY = Family(
    blocks={
        ShiftedWindowAttention: AcceleratedShiftedWindowAttention,
        ShiftedWindowAttentionV2: AcceleratedShiftedWindowAttentionV2,
        ShiftedWindowAttention3d: AcceleratedShiftedWindowAttention3d,
        PartitionAttentionLayer: AcceleratedPartitionAttentionLayer,
    },
    attentions={RelativePositionalMultiHeadAttention: MaxVitAttentionOnMaps},
    inside=("attn_layer.1",),
    added=("window",),
    partly=dict.fromkeys((ShiftedWindowAttention, ShiftedWindowAttentionV2), _PARTLY)
    | {ShiftedWindowAttention3d: "shifted windows in training on a CPU are torchvision's"}
    | {PartitionAttentionLayer: "on a CPU it is torchvision's, whose pixels stay side by side in all of the layer"},
)
