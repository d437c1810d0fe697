"""Uformer (Wang et al., arXiv 2106.03106) of spandrel: windows of square maps, whose tokens may have a modulator."""

from __future__ import annotations

from typing import Any

import torch
from spandrel.architectures.Uformer.__arch.Uformer import LeWinTransformerBlock, LinearProjection, WindowAttention
from torch import Tensor, nn

from ..._tracing import leaf_of_fx
from ...axis import local
from ...partition import Partition
from .families import Family
from .restoration import TRAINING, WindowsOfMaps, bias_of
from .windows import cached_bias, trains_faster_theirs


class MapWindowAttention(WindowsOfMaps, WindowAttention):
    """`WindowAttention` of maps [B, H, W, C]."""

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        tokens = self.qkv(x.flatten(1, -2))  # q, k, v [B, heads, H W, width]
        return tuple(t.transpose(1, 2).unflatten(1, x.shape[1:-1]) for t in tokens)

    def position_bias(self, partition: Partition) -> Tensor:
        table, tokens = self.relative_position_bias_table, (partition.h.tokens, partition.w.tokens)
        return cached_bias(self, [table], lambda: bias_of(table, self.relative_position_index), tokens)


class AcceleratedLeWinTransformerBlock(LeWinTransformerBlock):
    """`LeWinTransformerBlock` of tokens [B, H W, C]."""

    backend: str
    win_size: int
    shift_size: int
    modulator: nn.Embedding | None
    cross_modulator: nn.Embedding | None
    attn: nn.Module
    norm1: Any
    norm2: Any
    drop_path: Any
    mlp: Any
    norm_cross: Any
    cross_attn: Any

    @leaf_of_fx
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None or trains_faster_theirs(x, self.backend):
            return super().forward(x, mask)
        if self.cross_modulator is not None:
            x = x + self.cross_attn(x, self.cross_modulator.weight)
        size = (round(x.shape[1] ** 0.5),) * 2
        partition = Partition(*(local(extent, self.win_size, self.shift_size) for extent in size))
        tokens = self.norm1(x).unflatten(1, size)  # [B, H, W, C]
        if self.modulator is not None:
            tokens = tokens + self.modulators(partition)
        x = x + self.drop_path(self.attn(tokens, partition=partition, backend=self.backend).flatten(1, 2))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def modulators(self, partition: Partition) -> Tensor:
        """Of every pixel [H, W, C] that of its place in its window."""
        assert self.modulator is not None
        h, w = (torch.arange(axis.size, device=self.modulator.weight.device) - axis.origin for axis in partition)
        return self.modulator((h % self.win_size)[:, None] * self.win_size + w % self.win_size)


FAMILY = Family(
    blocks={LeWinTransformerBlock: AcceleratedLeWinTransformerBlock},
    attentions={WindowAttention: MapWindowAttention, LinearProjection: LinearProjection},
    inside=("attn", "attn.qkv"),
    partly={LeWinTransformerBlock: f"{TRAINING}, and so is a call with a mask of pixels"},
    added=("modulators",),
)
