"""timm's MaxViT and Swin: windows and grids where they lie, without masks or size limits.

MaxViT (Tu et al., arXiv 2204.01697, section 3) attends inside windows of a fixed size, then inside grids of a fixed
size: `Partition.local` and `Partition.interlaced(grid=)`. Swin (Liu et al., arXiv 2103.14030, section 3.2) attends
inside windows, then inside windows that are shifted: `Partition.local(shift=)`. Their position biases are the `bias` of
attention.

Maps that the window or grid does not divide: MaxViT, which refuses them in timm, attends to the real pixels only; Swin
attends to zeros behind the map too, as in timm. Images of any size go through MaxViT of the "tf" kind; of the "rw"
kind, whose pooling is timm's own, multiples of 32 do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.maxxvit import (
    Attention2d,
    AttentionCl,
    ParallelPartitionAttention,
    PartitionAttention2d,
    PartitionAttentionCl,
)
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from ..._tracing import is_known_to_be, is_plain, leaf_of_fx
from ...axis import ceil_div, grid, local
from ...maps import at_most, unpad
from ...partition import Partition
from .families import Family
from .windows import GivenPartitions, attend, cached_bias, cropped, project, split, trains_faster_theirs


class _Attention(GivenPartitions):
    """What timm's attention modules have in common."""

    num_heads: int
    scale: float
    rel_pos: Any
    qkv: nn.Module
    attn_drop: nn.Dropout
    proj_drop: nn.Module

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return split(project(self.qkv, x), self.num_heads, heads_first=getattr(self, "head_first", False))

    def factor(self) -> float:
        return self.scale

    def output(self, context: Tensor) -> Tensor:
        return self.proj_drop(project(self.proj, context))

    def dropout_p(self) -> float:
        return self.attn_drop.p

    def position_bias(self, partition: Partition) -> Tensor | None:
        if self.rel_pos is None:
            return None
        bias = cached_bias(self.rel_pos, list(self.rel_pos.parameters()), self.rel_pos.get_bias).flatten(0, -3)
        return cropped(bias, self.rel_pos.window_size, (partition.h.tokens, partition.w.tokens))


class MapAttentionCl(_Attention, AttentionCl):
    """`AttentionCl` of maps [B, H, W, C]."""


class MapAttention2d(_Attention, Attention2d):
    """`Attention2d` of maps [B, C, H, W]."""

    def of_map(self, x: Tensor, partition: Partition, backend: str) -> Tensor:
        return attend(self, x.permute(0, 2, 3, 1), partition, backend).permute(0, 3, 1, 2)

    def gathers(self) -> bool:
        return is_plain(self.qkv, nn.Conv2d) and is_plain(self.proj, nn.Conv2d)  # what else stands there takes maps


class MapWindowAttention(_Attention, WindowAttention):
    """Swin's `WindowAttention` of maps [B, H, W, C]."""

    relative_position_bias_table: nn.Parameter
    _get_rel_pos_bias: Any

    def position_bias(self, partition: Partition) -> Tensor:
        return cached_bias(self, [self.relative_position_bias_table], self._get_rel_pos_bias)[0]


class AcceleratedBlockCl(PartitionAttentionCl):
    """`PartitionAttentionCl`: windows or a grid of maps [B, H, W, C]."""

    backend: str
    forward = leaf_of_fx(PartitionAttentionCl.forward)

    def _partition_attn(self, x: Tensor) -> Tensor:
        partition = _block_or_grid(x.shape[1:3], self.partition_size, self.partition_block)
        return self.attn(x, partition=partition, backend=self.backend)


class AcceleratedBlock2d(PartitionAttention2d):
    """`PartitionAttention2d`: windows or a grid of maps [B, C, H, W]."""

    backend: str
    forward = leaf_of_fx(PartitionAttention2d.forward)

    def _partition_attn(self, x: Tensor) -> Tensor:
        partition = _block_or_grid(x.shape[2:], self.partition_size, self.partition_block)
        return self.attn(x, partition=partition, backend=self.backend)


class AcceleratedParallelBlock(ParallelPartitionAttention):
    """`ParallelPartitionAttention`: windows beside a grid, of maps [B, H, W, C]."""

    backend: str
    forward = leaf_of_fx(ParallelPartitionAttention.forward)

    def _partition_attn(self, x: Tensor) -> Tensor:
        block, grid = (_block_or_grid(x.shape[1:3], self.partition_size, block) for block in (True, False))
        attended = self.attn_block(x, partition=block, backend=self.backend)
        return torch.cat([attended, self.attn_grid(x, partition=grid, backend=self.backend)], -1)


class RolledWindows(nn.Module):
    """A block of Swin's and its kin's: windows of maps [B, H, W, C], shifted or not."""

    attn: nn.Module
    backend: str
    window_size: tuple[int, int]
    shift_size: tuple[int, int]

    def attended(self, x: Tensor, theirs: Callable[[Tensor], Tensor]) -> Tensor:
        """A map, or what is theirs of it."""
        (height, width), window, shift = x.shape[1:3], self.window_size, self.shift_size
        whole = ceil_div(height, window[0]) * window[0], ceil_div(width, window[1]) * window[1]
        behind = 0, 0, 0, whole[1] - width, 0, whole[0] - height
        divides = is_known_to_be(whole[0] - height + whole[1] - width == 0)
        if any(shift) and divides and trains_faster_theirs(x, self.backend) and self.has_mask(x):
            return theirs(x)
        if not divides:  # the zeros lie behind the rolled map: what came round is in front of them
            x = _roll(F.pad(_roll(x, shift, -1), behind), shift, 1)
        partition = Partition(*map(local, whole, window, shift))
        x = self.attn(x, partition=partition, backend=self.backend)
        return x if divides else _roll(unpad(_roll(x, shift, -1), behind), shift, 1)

    def has_mask(self, x: Tensor) -> bool:
        """Whether timm has a mask for maps of the size of x [B, H, W, C]."""
        height, width = self.masked_size()
        made_anew = getattr(self, "dynamic_mask", False)  # which timm 1.0.3 does not know
        return made_anew or (is_known_to_be(x.shape[1] == height) and is_known_to_be(x.shape[2] == width))

    def masked_size(self) -> tuple[int, int]:
        """The maps that its mask is for, where that is not made anew."""
        size: Any = self.input_resolution
        return size


class AcceleratedSwinBlock(RolledWindows, SwinTransformerBlock):
    """`SwinTransformerBlock`: windows, shifted or not, of maps [B, H, W, C]."""

    forward = leaf_of_fx(SwinTransformerBlock.forward)

    def _attn(self, x: Tensor) -> Tensor:
        return self.attended(x, super()._attn)


def _block_or_grid(size: Sequence[int], partition_size: tuple[int, int], block: bool) -> Partition:
    """MaxViT's windows or grid on a map of (H, W) pixels; a small map is one window."""
    tokens = map(at_most, partition_size, size)
    return Partition(*map(local if block else grid, size, tokens))


def _roll(x: Tensor, shift: tuple[int, int], sign: int) -> Tensor:
    """A map [B, H, W, C] rolled down and right by the shift, or back."""
    return x.roll((sign * shift[0], sign * shift[1]), (1, 2))


FAMILY = Family(
    blocks={
        PartitionAttentionCl: AcceleratedBlockCl,
        PartitionAttention2d: AcceleratedBlock2d,
        ParallelPartitionAttention: AcceleratedParallelBlock,
        SwinTransformerBlock: AcceleratedSwinBlock,
    },
    attentions={AttentionCl: MapAttentionCl, Attention2d: MapAttention2d, WindowAttention: MapWindowAttention},
    inside=("attn", "attn_block", "attn_grid"),
    partly={
        SwinTransformerBlock: "shifted windows in training on a CPU, on maps that timm's masks are for, are timm's"
    },
)
