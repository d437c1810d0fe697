"""Boltz's triangle attention: rows or columns of a map of pairs [B, N, N, C], each with a bias of all pairs.

AlphaFold's (Jumper et al., Nature 596, supplement 1.6.6): pairs (i, j) attend to (i, k) with a bias of (j, k), or
around the ending node to (k, j) with a bias of (k, i). Here no pair of pairs [B, N, heads, N, N] is ever made, so
nothing has to be chunked either.
"""

from __future__ import annotations

from typing import Any

import torch
from boltz.model.layers.triangular_attention.attention import TriangleAttention, TriangleAttentionEndingNode
from boltz.model.layers.triangular_attention.primitives import Attention
from torch import Tensor

from ..._tracing import leaf_of_fx
from ...functional import partitioned_attention
from ...partition import Partition
from .families import Family
from .windows import gathers


class MapAttention(Attention):
    """`Attention` of maps [B, N, N, C], tri_bias [B, heads, N, N] and mask_bias [B, N, N] of keys."""

    no_heads: int
    linear_q: Any
    linear_k: Any
    linear_v: Any
    _wrap_up: Any

    def forward(
        self,
        q_x: Tensor,
        kv_x: Tensor,
        tri_bias: Tensor,
        mask_bias: Tensor | None,
        mask: Tensor | None,
        use_kernels: bool = False,
        *,
        partition: Partition | None = None,
        backend: str = "auto",
    ) -> Tensor:
        if partition is None:
            attended: Tensor = super().forward(q_x, kv_x, tri_bias, mask_bias, mask, use_kernels)
            return attended
        q, k, v = (
            layer(x).unflatten(-1, (self.no_heads, -1))  # [B, N, N, heads, width]
            for layer, x in ((self.linear_q, q_x), (self.linear_k, kv_x), (self.linear_v, kv_x))
        )
        scale = q.shape[-1] ** -0.5
        if mask_bias is not None:  # of each key, as one more product: a query that is masked attends too
            q, k = _with(q, torch.ones_like(mask_bias)), _with(k, mask_bias / scale)
        context = partitioned_attention(q, k, v, partition, bias=tri_bias, scale=scale, backend=backend)
        return self._wrap_up(context, q_x)


def _with(x: Tensor, channel: Tensor) -> Tensor:
    """x [B, N, N, heads, width] with one more channel [B, N, N], the same for all heads."""
    return torch.cat([x, channel[..., None, None].expand(*x.shape[:-1], 1).to(x.dtype)], -1)


class _OfPairs(TriangleAttention):
    """`TriangleAttention` of maps [B, N, N, C], or of as many as there are leading axes."""

    backend: str
    starting: bool
    inf: float
    layer_norm: Any
    linear: Any
    mha: Any

    @leaf_of_fx
    def forward(
        self, x: Tensor, mask: Tensor | None = None, chunk_size: int | None = None, use_kernels: bool = False
    ) -> Tensor:
        faster_theirs = mask is not None and gathers(x, self.backend) and not torch.is_grad_enabled()
        if use_kernels or faster_theirs or x.shape[-2] != x.shape[-3]:
            attended: Tensor = super().forward(x, mask, chunk_size, use_kernels)
            return attended
        batch, size = x.shape[:-3], x.shape[-3:-1]
        x = self.layer_norm(x.reshape(-1, *x.shape[-3:]))  # [B, N, N, C]
        mask_bias = None if mask is None else self.inf * (mask.expand(*batch, *size).reshape(-1, *size) - 1)
        axis = -1 if self.starting else -2
        bias = self.linear(x).permute(0, 3, 1, 2)  # [B, heads, N, N]
        bias = bias if self.starting else bias.mT
        partition = Partition.axial(size, axis)
        y = self.mha(x, x, bias, mask_bias, mask, partition=partition, backend=self.backend)
        return y.view(*batch, *y.shape[1:])


class AcceleratedTriangleAttention(_OfPairs):
    """Around the starting node: rows."""


class AcceleratedTriangleAttentionEndingNode(_OfPairs, TriangleAttentionEndingNode):
    """Around the ending node: columns."""


PARTLY = "calls with use_kernels=True are cuequivariance's, and on a CPU those in inference with a mask Boltz's"

FAMILY = Family(
    blocks={
        TriangleAttention: AcceleratedTriangleAttention,
        TriangleAttentionEndingNode: AcceleratedTriangleAttentionEndingNode,
    },
    attentions={Attention: MapAttention},
    inside=("mha",),
    partly={TriangleAttention: PARTLY, TriangleAttentionEndingNode: PARTLY},
)
