"""Hiera (Ryali et al., arXiv 2306.00989) as SAM 2 has it: windows of maps [B, H, W, C], with zeros behind them.

Zeros are projected too, so they are keys, the bias of the projection, but all are the same one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...axis import local
from ...partition import Partition
from .windows import GivenPartitions, attend_with_zeros, split


class WindowsOfMaps(GivenPartitions):
    """An attention of tokens [B, H, W, C], all of them; here of windows."""

    qkv: nn.Module
    number_of_heads: str  # where theirs has that

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return split(self.qkv(x), getattr(self, self.number_of_heads))

    def of_map(self, x: Tensor, partition: Partition, backend: str) -> Tensor:
        return attend_with_zeros(self, x, partition, backend)


def attended(block: Any, x: Tensor) -> Tensor:
    """What the attention of a block makes of the map x [B, H, W, C] in windows."""
    partition = Partition(*(local(extent, block.window_size) for extent in x.shape[1:3]))
    y: Tensor = block.attn(x, partition=partition, backend=block.backend)
    return y


def pools(block: Any, stride: Any) -> bool:
    """Whether a block is left to theirs: the whole map attends, or queries are fewer than keys."""
    return block.window_size == 0 or bool(stride)


PARTLY = "blocks that attend to the whole map, or whose queries are pooled, so fewer than keys, are {}'s"
