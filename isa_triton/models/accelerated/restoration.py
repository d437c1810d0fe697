"""Swin's blocks in networks that restore images: square windows of tokens [B, H W, C], shifted or not.

They pad images to whole windows, and make a mask of every size but the one of their training. Here is none.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..._tracing import leaf_of_fx
from ...axis import local
from ...partition import Partition
from .windows import GivenPartitions, cached_bias, project, split, trains_faster_theirs

# The logarithm of the largest scale of cosine attention, which is theirs in fp32 under every dtype.
MOST_LOG_SCALE = 4.605170249938965


class WindowsOfMaps(GivenPartitions):
    """Swin's window attention: one product for q, k and v, a table of biases by distance."""

    num_heads: int
    scale: float
    window_size: tuple[int, int]
    qkv: nn.Module
    attn_drop: nn.Dropout
    proj_drop: nn.Module
    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return split(project(self.qkv, x), self.num_heads)

    def factor(self) -> float | Tensor:
        return self.scale

    def output(self, context: Tensor) -> Tensor:
        return self.proj_drop(project(self.proj, context))

    def dropout_p(self) -> float:
        return self.attn_drop.p

    def position_bias(self, partition: Partition) -> Tensor:
        table, tokens = self.relative_position_bias_table, (partition.h.tokens, partition.w.tokens)
        return cached_bias(self, [table], lambda: bias_of(table, self.relative_position_index), tokens)


class CosineWindowsOfMaps(WindowsOfMaps):
    """SwinV2's: cosines with a learned scale, biases by an MLP of distances, no bias of keys."""

    cpb_mlp: nn.Module
    logit_scale: nn.Parameter
    relative_coords_table: Tensor
    q_bias: nn.Parameter | None
    v_bias: nn.Parameter | None
    qkv: Any
    cosine = True

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        q, k, v = split(F.linear(x, self.qkv.weight), self.num_heads)
        if self.q_bias is not None and self.v_bias is not None:
            q, v = q + self.q_bias.view(q.shape[-2:]), v + self.v_bias.view(v.shape[-2:])
        return q, k, v

    def factor(self) -> Tensor:
        return self.logit_scale.clamp(max=MOST_LOG_SCALE).exp().flatten()

    def position_bias(self, partition: Partition) -> Tensor:
        def compute() -> Tensor:
            table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
            return 16 * bias_of(table, self.relative_position_index).sigmoid()

        return cached_bias(self, list(self.cpb_mlp.parameters()), compute)


def bias_of(table: Tensor, index: Tensor) -> Tensor:
    """[heads, tokens, tokens] of a table [distances, heads] and the distance [tokens, tokens] of every pair."""
    return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1)


class SquareWindows(nn.Module):
    """Stands before a block class of theirs that has an attention of ours."""

    attn: nn.Module
    window_size: int
    shift_size: int
    backend: str

    def attended(self, x: Tensor, size: tuple[int, int], **options: Any) -> Tensor:
        """Attention of tokens [B, H W, C] of a map of size (H, W)."""
        partition = Partition(*(local(extent, self.window_size, self.shift_size) for extent in size))
        x = x.unflatten(1, size)
        return self.attn(x, partition=partition, backend=self.backend, **options).flatten(1, 2)

    def is_theirs(self, x: Tensor) -> bool:
        """Whether tokens are attended by their own code, because that trains faster."""
        return self.shift_size > 0 and trains_faster_theirs(x, self.backend)


class TokenBlock(SquareWindows):
    """Stands before a block class of theirs of tokens [B, H W, C] that norms what it attends to (SwinIR, DRCT)."""

    norm1: Any
    norm2: Any
    drop_path: Any
    mlp: Any

    @leaf_of_fx
    def forward(self, x: Tensor, x_size: tuple[int, int]) -> Tensor:
        if self.is_theirs(x):
            theirs: Tensor = super().forward(x, x_size)
            return theirs
        x = x + self.drop_path(self.attended(self.norm1(x), x_size))
        return x + self.drop_path(self.mlp(self.norm2(x)))


PARTLY = "shifted windows in training on a CPU are spandrel's"
TRAINING = "training on a CPU is spandrel's"
