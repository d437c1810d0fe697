"""timm's Hiera (Ryali et al., arXiv 2306.00989), of mask units on a line [B, L, C], and that of SAM 2, of windows."""

from __future__ import annotations

from typing import Any

from timm.models.hiera import MaskUnitAttention
from timm.models.hieradet_sam2 import MultiScaleAttention, MultiScaleBlock
from torch import Tensor

from ..._tracing import leaf_of_fx
from ...axis import interlaced
from ...partition import Partition
from .families import Family
from .hiera import PARTLY, WindowsOfMaps, attended
from .windows import TokensOf, attend, split


class _TokensOfUnit(TokensOf):
    """What a `MaskUnitAttention` does to tokens; it has a number under the name `heads`."""

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return split(self.attn.qkv(x), self.attn.heads)

    def output(self, context: Tensor) -> Tensor:
        y: Tensor = self.attn.proj(context)
        return y


class AcceleratedMaskUnitAttention(MaskUnitAttention):
    """`MaskUnitAttention` of lines [B, L, C]: unrolled, every L / window-th token is of the same unit."""

    backend: str
    q_stride: int
    window_size: int
    use_mask_unit_attn: bool

    @leaf_of_fx
    def forward(self, x: Tensor) -> Tensor:
        if self.q_stride > 1 or not self.use_mask_unit_attn:
            return super().forward(x)
        partition = Partition(interlaced(x.shape[1], x.shape[1] // self.window_size))
        return attend(_TokensOfUnit(self), x, partition, self.backend)


class MapMultiScaleAttention(WindowsOfMaps, MultiScaleAttention):
    """`MultiScaleAttention` of windows of maps [B, H, W, C]."""

    number_of_heads = "num_heads"


class AcceleratedMultiScaleBlock(MultiScaleBlock):
    """`MultiScaleBlock` of maps [B, H, W, C]."""

    backend: str
    is_windowed: bool
    q_stride: Any
    dim: int
    dim_out: int
    norm1: Any
    norm2: Any
    ls1: Any
    ls2: Any
    drop_path1: Any
    drop_path2: Any
    mlp: Any

    @leaf_of_fx
    def forward(self, x: Tensor) -> Tensor:
        if not self.is_windowed or self.q_stride is not None or self.dim != self.dim_out:
            return super().forward(x)
        x = x + self.drop_path1(self.ls1(attended(self, self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


FAMILY = Family(
    blocks={MaskUnitAttention: AcceleratedMaskUnitAttention, MultiScaleBlock: AcceleratedMultiScaleBlock},
    attentions={MultiScaleAttention: MapMultiScaleAttention},
    inside=("attn",),
    partly=dict.fromkeys((MaskUnitAttention, MultiScaleBlock), PARTLY.format("timm")),
)
