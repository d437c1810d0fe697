"""HRFormer's attention (Yuan et al., arXiv 2110.09408, section 3): heads inside windows, with a position bias.

Zeros on both sides of the map fill windows, as the authors pad, and are attended. Their weights load by
`isa_triton.checkpoints.from_hrformer`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._tracing import leaf_of_fx
from ..backend import check_backend
from ..functional import partitioned_attention
from ..maps import (
    Attends,
    PartitionSize,
    check_flag,
    check_heads,
    check_map,
    check_partition_size,
    check_probability,
    check_widths,
    crop,
    linear,
    pad_to_multiple,
)
from ..partition import Partition


class HRFormerAttention(Attends):
    """Multi-head attention inside windows of a map. HRFormer puts a norm of channels before it and adds its input.

    Args:
        channels: of the map; a multiple of num_heads.
        num_heads: side by side.
        partition_size: of the windows, one number or (H, W); the authors' is 7.
        position_bias: whether scores have one, of (2 H - 1) (2 W - 1) distances for each head.
        attention_dropout: probability that a weight of attention is dropped in training, less than 1; an attribute too.
        backend: of `partitioned_attention`.

    x [B, C, H, W] -> [B, C, H, W], channels_last.

    Raises:
        ValueError: sizes below 1, channels that num_heads does not divide, or another map.
        TypeError: an argument of the wrong kind.

    Examples:
        >>> HRFormerAttention(78, 2)(torch.randn(1, 78, 16, 12)).shape
        torch.Size([1, 78, 16, 12])
    """

    relative_position_bias_table: nn.Parameter | None
    relative_position_index: Tensor
    q_proj: Any
    k_proj: Any
    v_proj: Any
    out_proj: Any

    def __init__(
        self,
        channels: int,
        num_heads: int,
        partition_size: PartitionSize = 7,
        *,
        position_bias: bool = True,
        attention_dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_widths(channels=channels)
        check_heads(num_heads, channels=channels)
        self.num_heads = num_heads
        self.partition_size = height, width = check_partition_size(partition_size)
        self.attention_dropout = check_probability("attention_dropout", attention_dropout, less=True)
        self._backend = check_backend(backend)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(channels, channels) for _ in range(4))
        self.relative_position_bias_table = None
        if check_flag("position_bias", position_bias):
            self.relative_position_bias_table = nn.Parameter(torch.empty((2 * height - 1) * (2 * width - 1), num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", _distances(height, width), persistent=False)

    @leaf_of_fx
    def forward(self, x: Tensor) -> Tensor:
        check_map(x, self.out_proj.in_features)
        size = x.shape[2:]
        tokens = pad_to_multiple(x, self.partition_size).permute(0, 2, 3, 1).contiguous()  # [B, H, W, C]
        partition = Partition.local(tokens.shape[1:3], self.partition_size)
        q, k, v = (
            linear(tokens, layer.weight, layer.bias).unflatten(-1, (self.num_heads, -1))
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        options: Any = {"bias": self.position_bias(), "dropout_p": self.attention_dropout if self.training else 0.0}
        context = partitioned_attention(q, k, v, partition, backend=self._backend, **options)
        y = linear(context.flatten(-2), self.out_proj.weight, self.out_proj.bias)
        return crop(y.permute(0, 3, 1, 2), size)

    def position_bias(self) -> Tensor | None:
        """[heads, tokens, tokens], by the distance from key to query."""
        table = self.relative_position_bias_table
        return None if table is None else table[self.relative_position_index].permute(2, 0, 1)

    def extra_repr(self) -> str:
        height, width = self.partition_size
        return f"{self.out_proj.in_features}, num_heads={self.num_heads}, partition_size=({height}, {width})"


def _distances(height: int, width: int) -> Tensor:
    """[tokens, tokens]: the row that a table of (2 height - 1) (2 width - 1) has for the distance of two tokens."""
    h, w = (torch.arange(n)[:, None] - torch.arange(n) + n - 1 for n in (height, width))
    index = h[:, None, :, None] * (2 * width - 1) + w[None, :, None, :]  # [H, W, H, W]
    return index.flatten(2).flatten(0, 1)
