"""Hiera (Ryali et al., arXiv 2306.00989) of transformers: mask units, whose tokens lie apart on a line [B, L, C]."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.models.hiera.modeling_hiera import HieraMaskUnitAttention

from ..._tracing import leaf_of_fx
from ...axis import interlaced
from ...partition import Partition
from .families import Family
from .windows import OnMaps, attend, split


class AcceleratedHieraMaskUnitAttention(OnMaps, HieraMaskUnitAttention):
    """`HieraMaskUnitAttention` of lines [B, L, C]: unrolled, every L / window-th token is of the same unit."""

    backend: str
    num_heads: int
    query_stride: int
    window_size: int
    use_mask_unit_attn: bool
    scale: float
    qkv: nn.Module

    @leaf_of_fx
    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        if output_attentions or self.query_stride > 1 or not self.use_mask_unit_attn:
            theirs: tuple[Tensor, Tensor | None] = super().forward(hidden_states, output_attentions)
            return theirs
        length = hidden_states.shape[1]
        partition = Partition(interlaced(length, length // self.window_size))
        return attend(self, hidden_states, partition, self.backend), None

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return split(self.qkv(x), self.num_heads)

    def factor(self) -> float:
        return self.scale


FAMILY = Family(
    blocks={HieraMaskUnitAttention: AcceleratedHieraMaskUnitAttention},
    partly={
        HieraMaskUnitAttention: "those that attend to the whole map, whose queries are pooled, or whose weights are"
        " asked for, are transformers'"
    },
)
