"""HAT (Chen et al., arXiv 2205.04437) of spandrel: windows; those in larger windows of keys stay theirs."""

from __future__ import annotations

from typing import Any

import torch
from spandrel.architectures.HAT.__arch.HAT import HAB, HAT, OCAB, WindowAttention
from torch import Tensor, nn

from ..._tracing import leaf_of_fx
from ...partition import Partition
from .families import Family
from .restoration import PARTLY, SquareWindows, WindowsOfMaps, bias_of
from .windows import attend, cached_bias


class MapWindowAttention(WindowsOfMaps, WindowAttention):
    """`WindowAttention` of maps [B, H, W, C]; the network has the distances rpi [tokens, tokens] of all its windows."""

    def forward(  # type: ignore[override]  # theirs has rpi
        self,
        x: Tensor,
        rpi: Tensor,
        mask: Tensor | None = None,
        *,
        partition: Partition | None = None,
        backend: str = "auto",
    ) -> Tensor:
        if partition is None:
            theirs: Tensor = super().forward(x, rpi, mask)
            return theirs
        table = self.relative_position_bias_table
        return attend(self, x, partition, backend, bias=cached_bias(self, [table], lambda: bias_of(table, rpi)))


class AcceleratedHAB(SquareWindows, HAB):
    """`HAB` of tokens [B, H W, C]: windows beside convolutions."""

    norm1: Any
    norm2: Any
    drop_path: Any
    mlp: Any
    conv_block: Any
    conv_scale: float

    @leaf_of_fx
    def forward(self, x: Tensor, x_size: tuple[int, int], rpi_sa: Tensor, attn_mask: Tensor) -> Tensor:
        if self.is_theirs(x):
            return super().forward(x, x_size, rpi_sa, attn_mask)
        tokens = self.norm1(x)
        local = self.conv_block(tokens.unflatten(1, x_size).permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        x = x + self.drop_path(self.attended(tokens, x_size, rpi=rpi_sa)) + local * self.conv_scale
        return x + self.drop_path(self.mlp(self.norm2(x)))


class HATWithoutMask(HAT):
    """`HAT`, which makes one mask for all of its blocks, only where one of them takes it."""

    layers: Any
    conv_first: nn.Conv2d

    def calculate_mask(self, x_size: tuple[int, int], dtype: torch.dtype) -> Tensor:
        blocks = [block for layer in self.layers for block in layer.residual_group.blocks]
        if any(type(block) is not AcceleratedHAB or block.is_theirs(self.conv_first.weight) for block in blocks):
            mask: Tensor = super().calculate_mask(x_size, dtype)
            return mask
        return torch.empty(0, dtype=dtype)


FAMILY = Family(
    blocks={HAB: AcceleratedHAB},
    holders={HAT: HATWithoutMask},
    attentions={WindowAttention: MapWindowAttention},
    inside=("attn",),
    left={OCAB: "its keys are those of larger windows, which overlap: no partition"},
    partly={HAB: PARTLY},
)
