"""DAT (Chen et al., arXiv 2308.03364) of spandrel: of half of the channels long windows, of the others tall ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from spandrel.architectures.DAT.__arch import DAT as theirs
from torch import Tensor, nn

from ..._tracing import leaf_of_fx
from ...axis import ceil_div, local
from ...partition import Partition
from .families import Family
from .restoration import PARTLY, bias_of
from .windows import TokensOf, attend, cached_bias, trains_faster_theirs


class _TokensOfBranch(TokensOf):
    """What a `Spatial_Attention` does to q, k and v [..., 3, C]; its `position_bias` is a truth value."""

    def heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unflatten(-1, (self.attn.num_heads, -1)).unbind(-3)

    def factor(self) -> float:
        factor: float = self.attn.scale
        return factor

    def output(self, context: Tensor) -> Tensor:
        return context

    def dropout_p(self) -> float:
        p: float = self.attn.attn_drop.p
        return p

    def position_bias(self, partition: Partition) -> Tensor | None:
        def compute() -> Tensor:
            return bias_of(self.attn.pos(self.attn.rpe_biases), self.attn.relative_position_index)

        window = partition.h.tokens, partition.w.tokens
        return cached_bias(self.attn, list(self.attn.pos.parameters()), compute, window)


class MapSpatialAttention(theirs.Spatial_Attention):
    """`Spatial_Attention` of q, k and v of a map [B, H, W, 3, C]."""

    def forward(
        self,
        qkv: Tensor,
        H: int,
        W: int,
        mask: Tensor | None = None,
        *,
        partition: Partition | None = None,
        backend: str = "auto",
    ) -> Tensor:
        if partition is None:
            windows: Tensor = super().forward(qkv, H, W, mask)
            return windows
        return attend(_TokensOfBranch(self), qkv, partition, backend)


class AcceleratedSpatialAttention(theirs.Adaptive_Spatial_Attention):
    """`Adaptive_Spatial_Attention` of tokens [B, H W, C]: two windows beside a convolution."""

    backend: str
    split_size: tuple[int, int]
    shift_size: tuple[int, int]
    attn_mask_0: Tensor | None
    qkv: nn.Module
    attns: nn.ModuleList
    dwconv: nn.Module
    channel_interaction: nn.Module
    spatial_interaction: nn.Module
    proj: nn.Module
    proj_drop: nn.Module

    @leaf_of_fx
    def forward(self, x: Tensor, H: int, W: int) -> Tensor:
        if self.attn_mask_0 is not None and trains_faster_theirs(x, self.backend):
            tokens: Tensor = super().forward(x, H, W)
            return tokens
        qkv = self.qkv(x).unflatten(-1, (3, -1)).unflatten(1, (H, W))  # [B, H, W, 3, C]
        attended = torch.cat([self.branch(i, half) for i, half in enumerate(qkv.chunk(2, -1))], -1)
        attended = attended.permute(0, 3, 1, 2).contiguous()
        conv = self.dwconv(qkv[..., 2, :].permute(0, 3, 1, 2).contiguous())
        of_channels = self.channel_interaction(conv).sigmoid()
        of_pixels = self.spatial_interaction(attended).sigmoid()
        mixed = attended * of_channels + conv * of_pixels  # [B, C, H, W]
        return self.proj_drop(self.proj(mixed.flatten(2).transpose(1, 2)))

    def branch(self, i: int, qkv: Tensor) -> Tensor:
        """What branch i, whose windows are turned where that is 1, attends of its half of the channels."""
        window, shift = (sizes[::-1] if i else sizes for sizes in (self.split_size, self.shift_size))
        (height, width), whole = qkv.shape[1:3], max(window)
        down, right = (ceil_div(extent, whole) * whole for extent in (height, width))
        if self.attn_mask_0 is None:  # of a block that shifts there is one
            shift = 0, 0
        qkv = F.pad(qkv, (0, 0, 0, 0, 0, right - width, 0, down - height))  # keys of 0, which are attended
        partition = Partition(*map(local, (down, right), window, shift))
        return self.attns[i](qkv, down, right, partition=partition, backend=self.backend)[:, :height, :width]


FAMILY = Family(
    blocks={theirs.Adaptive_Spatial_Attention: AcceleratedSpatialAttention},
    attentions={theirs.Spatial_Attention: MapSpatialAttention},
    inside=("attns.0", "attns.1"),
    left={theirs.Adaptive_Channel_Attention: "its tokens are channels, of no map"},
    partly={theirs.Adaptive_Spatial_Attention: PARTLY},
    added=("branch",),
)
