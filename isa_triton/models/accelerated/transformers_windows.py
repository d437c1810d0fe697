"""What transformers' kin of Swin have in common: layers of tokens [B, H W, C] of a map (H, W), in square windows.

Maps that windows do not divide have zeros behind them, which are attended, and are shifted with them. Who asks for
attention weights gets them of their layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ...partition import Partition
from .families import Classes, Family
from .windows import GivenPartitions, cached_bias, in_windows, project, trains_faster_theirs

PARTLY = "calls that ask for attention weights, and shifted windows in training on a CPU, are transformers'"


class SelfAttentionOnMaps(GivenPartitions):
    """Attention with a query's, a key's and a value's layer; the output's stands beside it."""

    query: nn.Module
    key: nn.Module
    value: nn.Module
    dropout: nn.Dropout
    num_attention_heads: int
    window_size: tuple[int, int]
    relative_position_index: Tensor
    relative_position_bias_table: nn.Parameter

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return in_heads((self.query, self.key, self.value), x, self.num_attention_heads)

    def output(self, context: Tensor) -> Tensor:
        return context

    def dropout_p(self) -> float:
        return self.dropout.p

    def position_bias(self, partition: Partition) -> Tensor:
        table = self.relative_position_bias_table
        return cached_bias(self, [table], lambda: self.of_windows(table))

    def of_windows(self, table: Tensor) -> Tensor:
        """The bias [heads, T, T] of a table [distances, heads]."""
        tokens = math.prod(self.window_size)
        return table[self.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)

    def of_map(self, x: Tensor, partition: Partition, backend: str) -> tuple[Tensor]:
        return (super().of_map(x, partition, backend),)


class CosineSelfAttentionOnMaps(SelfAttentionOnMaps):
    """That of SwinV2: cosines of queries and keys, and an MLP of distances."""

    cosine = True
    logit_scale: nn.Parameter
    continuous_position_bias_mlp: nn.Module
    relative_coords_table: Tensor

    def factor(self) -> Tensor:
        return self.logit_scale.clamp(max=math.log(100.0)).exp().flatten()

    def position_bias(self, partition: Partition) -> Tensor:
        mlp = self.continuous_position_bias_mlp

        def compute() -> Tensor:
            table = mlp(self.relative_coords_table).view(-1, self.num_attention_heads)
            return self.of_windows(16 * torch.sigmoid(table))

        return cached_bias(self, list(mlp.parameters()), compute)


class AttentionOnMaps(nn.Module):
    """Such an attention with the output's layer behind it."""

    self: nn.Module
    output: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, partition: Partition | None = None, **options: Any) -> Any:
        if partition is None:
            return super().forward(hidden_states, *args, **options)
        (context,) = self.self(hidden_states, partition=partition, **options)
        return (self.output(context, hidden_states),)


class Windows(nn.Module):
    """A layer in windows of `window_size` pixels on both axes, shifted by `shift_size`."""

    backend: str
    window_size: int
    shift_size: int
    attention: nn.Module
    layernorm_before: nn.Module
    layernorm_after: nn.Module
    drop_path: nn.Module
    intermediate: nn.Module
    output: nn.Module

    def is_left(self, x: Tensor, output_attentions: bool | None) -> bool:
        """Whether a call is theirs."""
        return bool(output_attentions) or (self.shift_size > 0 and trains_faster_theirs(x, self.backend))

    def attended(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [B, H W, C] of a map of that size, attended."""

        def of_map(x: Tensor, partition: Partition) -> Any:
            return self.attention(x, partition=partition, backend=self.backend)[0]

        window, shift = [int(self.window_size)] * 2, [int(self.shift_size)] * 2
        return in_windows(x.view(x.shape[0], *size, x.shape[-1]), window, shift, of_map).flatten(1, 2)

    def layer(self, x: Tensor, size: tuple[int, int]) -> Any:
        """All of it, as of Swin: norms are in front."""
        x = x + self.drop_path(self.attended(self.layernorm_before(x), size))
        return x + self.output(self.intermediate(self.layernorm_after(x)))


class FixedWindows(Windows):
    """Windows of the size they were made for, whatever maps come."""

    def forward(self, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: bool = False) -> Any:
        if self.is_left(hidden_states, output_attentions):
            return super().forward(hidden_states, input_dimensions, output_attentions)
        return (self.layer(hidden_states, input_dimensions),)


class ClampedWindows(Windows):
    """Windows that become as small as a map, for good."""

    set_shift_and_window_size: Any

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool = False,
        always_partition: bool = False,
    ) -> Any:
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        if self.is_left(hidden_states, output_attentions):
            return super().forward(hidden_states, input_dimensions, output_attentions, always_partition)
        return (self.layer(hidden_states, input_dimensions),)


class NormsBehind(FixedWindows):
    """A layer of SwinV2's: norms are behind."""

    def layer(self, x: Tensor, size: tuple[int, int]) -> Any:
        x = x + self.drop_path(self.layernorm_before(self.attended(x, size)))
        return x + self.drop_path(self.layernorm_after(self.output(self.intermediate(x))))


def in_heads(layers: tuple[nn.Module, ...], x: Tensor, heads: int) -> tuple[Tensor, ...]:
    """What layers make of x [..., C], each [..., heads, width]."""
    return tuple(project(layer, x).unflatten(-1, (heads, -1)) for layer in layers)


def family(layers: Classes, self_attentions: Classes, attentions: Classes) -> Family:
    """Of layers that hold an `attention`, which holds a `self`."""
    return Family(
        blocks=layers,
        attentions=attentions | self_attentions,
        inside=("attention", "attention.self"),
        partly=dict.fromkeys(layers, PARTLY),
    )
