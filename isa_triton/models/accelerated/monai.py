"""MONAI's Swin UNETR (Hatamizadeh et al., arXiv 2201.01266): windows of maps [B, H, W, C] and volumes [B, D, H, W, C].

They have zeros behind them where windows do not divide them, which are attended; an axis that one window covers is not
shifted. A stage hands its blocks the mask of shifted windows, of all pairs of pixels in them: ours need none.
"""

from __future__ import annotations

from typing import Any

from monai.networks.nets.swin_unetr import BasicLayer, SwinTransformerBlock, WindowAttention, get_window_size
from torch import Tensor, nn

from ...partition import Partition
from .families import Family
from .windows import GivenPartitions, cached_bias, in_windows, project, split, trains_faster_theirs


class WindowAttentionOnMaps(GivenPartitions, WindowAttention):
    """`WindowAttention` of maps and volumes, channels last."""

    qkv: nn.Module
    attn_drop: nn.Dropout
    proj_drop: nn.Module
    num_heads: int
    scale: float
    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return split(project(self.qkv, x), self.num_heads)

    def factor(self) -> float:
        return self.scale

    def output(self, context: Tensor) -> Tensor:
        return self.proj_drop(project(self.proj, context))

    def dropout_p(self) -> float:
        return self.attn_drop.p

    def position_bias(self, partition: Partition) -> Tensor:
        n = partition.tokens

        def compute() -> Tensor:  # a smaller window has the first entries, wherever its pixels lie
            index = self.relative_position_index[:n, :n].reshape(-1)
            return self.relative_position_bias_table[index].view(n, n, -1).permute(2, 0, 1)

        return cached_bias(self, [self.relative_position_bias_table], compute, (n,))


class AcceleratedSwinTransformerBlock(SwinTransformerBlock):
    """`SwinTransformerBlock`: windows, shifted or not, of maps and volumes, channels last."""

    backend: str

    def forward_part1(self, x: Tensor, mask_matrix: Tensor | None) -> Any:
        if self.is_left(x):
            return super().forward_part1(x, mask_matrix)
        window, shift = get_window_size(x.shape[1:-1], self.window_size, self.shift_size)

        def of_map(x: Tensor, partition: Partition) -> Any:
            return self.attn(x, partition=partition, backend=self.backend)

        return in_windows(self.norm1(x), window, shift, of_map)

    def is_left(self, x: Tensor) -> bool:
        """Whether a call is theirs, and needs the mask."""
        return any(self.shift_size) and trains_faster_theirs(x, self.backend)


class StageWithoutMask(BasicLayer):
    """`BasicLayer` of maps [B, C, H, W] and volumes [B, C, D, H, W], which makes a mask only where a block takes it."""

    blocks: nn.ModuleList
    downsample: nn.Module | None

    def forward(self, x: Tensor) -> Any:
        if any(type(block) is not AcceleratedSwinTransformerBlock or block.is_left(x) for block in self.blocks):
            return super().forward(x)
        x = x.movedim(1, -1)
        for block in self.blocks:
            x = block(x, None)
        if self.downsample is not None:
            x = self.downsample(x)
        return x.movedim(-1, 1)


FAMILY = Family(
    blocks={SwinTransformerBlock: AcceleratedSwinTransformerBlock},
    attentions={WindowAttention: WindowAttentionOnMaps},
    inside=("attn",),
    holders={BasicLayer: StageWithoutMask},
    partly={SwinTransformerBlock: "shifted windows in training on a CPU are MONAI's"},
    added=("is_left",),
)
