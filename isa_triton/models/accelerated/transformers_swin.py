"""transformers' Swin (Liu et al., arXiv 2103.14030)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.swin.modeling_swin import SwinAttention, SwinLayer

from ...partition import Partition
from .families import Family
from .transformers_windows import PARTLY, Windows, in_heads
from .windows import GivenPartitions, cached_bias, project


class SwinAttentionOnMaps(GivenPartitions, SwinAttention):
    """`SwinAttention` of maps [B, H, W, C]."""

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    num_attention_heads: int
    attention_dropout: float
    relative_position_bias: Any

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return in_heads((self.q_proj, self.k_proj, self.v_proj), x, self.num_attention_heads)

    def output(self, context: Tensor) -> Tensor:
        return project(self.o_proj, context)

    def dropout_p(self) -> float:
        return self.attention_dropout

    def position_bias(self, partition: Partition) -> Tensor:
        bias = self.relative_position_bias
        return cached_bias(bias, list(bias.parameters()), bias)[0]

    def of_map(self, x: Tensor, partition: Partition, backend: str) -> tuple[Tensor, None]:
        return super().of_map(x, partition, backend), None


class AcceleratedSwinLayer(Windows, SwinLayer):
    """`SwinLayer`: windows, shifted or not, of tokens [B, H W, C]."""

    attention: Any
    set_shift_and_window_size: Any
    dropout: nn.Module
    mlp: nn.Module

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs: Any
    ) -> Any:
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        config = self.attention.config
        is_registered = config._attn_implementation not in ("eager", "sdpa")  # a user's own attention
        output_attentions = kwargs.get("output_attentions", config.output_attentions)
        if is_registered or self.is_left(hidden_states, output_attentions):
            return super().forward(hidden_states, input_dimensions, always_partition, **kwargs)
        return self.layer(hidden_states, input_dimensions), None

    def layer(self, x: Tensor, size: tuple[int, int]) -> Any:
        x = x + self.drop_path(self.dropout(self.attended(self.layernorm_before(x), size)))
        return x + self.dropout(self.mlp(self.layernorm_after(x)))


FAMILY = Family(
    blocks={SwinLayer: AcceleratedSwinLayer},
    attentions={SwinAttention: SwinAttentionOnMaps},
    inside=("attention",),
    partly={SwinLayer: PARTLY},
    added=("layer",),
)
