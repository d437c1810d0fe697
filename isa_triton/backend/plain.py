"""Attention over a partition as one expression, which PyTorch differentiates and vectorises to any order.

It holds all scores: made for derivatives beyond the first and for export, not to be fast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..axis import Axis
from ..dropout import factors, rows_of
from ..partition import Partition, flat_index
from . import packed
from .contract import Inputs, lse_dtype
from .cosine import normalised


def attention(
    inputs: Inputs, scale: float, partition: Partition, dropout_p: float = 0.0, cosine: bool = False
) -> tuple[Tensor, Tensor]:
    """out and lse, as `contract.Backend.forward` returns them."""
    if (table := inputs.table) is not None:
        out, lse = attention(packed.gathered(inputs), scale, partition, cosine=cosine)
        return packed.scatter(out, table, inputs.q), packed.scatter_lse(lse, table, inputs.q)
    q, k, v, bias, scales, valid, seed, _ = inputs
    size, device, n = partition.size, q.device, len(partition)
    if inputs.share > 1:
        k, v = (x.repeat_interleave(inputs.share, -2) for x in (k, v))
    if valid is not None:
        q, k, v = (x.masked_fill(~valid[..., None, None], 0) for x in (q, k, v))
    if cosine:
        q, k = normalised(q), normalised(k)
    q, k, v = (x.expand(-1, *size, -1, -1) for x in (q, k, v))  # refuses other sizes where a graph meets them
    group, token = torch.arange(partition.groups, device=device), torch.arange(partition.tokens, device=device)
    axes, partition = tuple(partition), Partition(*(_of_tensors(axis, device) for axis in partition))
    *place, inside = partition.coordinates(group[:, None], token)  # [G, T] each
    pixel = torch.where(inside, flat_index(tuple(place), axes), 0)
    qs, ks, vs = (t.flatten(1, n)[:, pixel].transpose(2, 3) for t in (q, k, v))  # [B, G, heads, T, width]
    outside = ~inside[:, None, None]  # [G, 1, 1, T]
    if valid is not None:
        outside = outside | ~valid.flatten(1)[:, pixel][:, :, None, None]  # [B, G, 1, 1, T]
    s = (scale * (qs @ ks.transpose(-1, -2))).to(lse_dtype(q.dtype))  # in which the largest bias and a score are finite
    if scales is not None:
        s = s * scales[:, None, None]
    if bias is not None:
        bias = bias if bias.dim() == 3 else bias[:, None]  # [heads, T, T] or [B, 1, heads, T, T]
        s = s + bias
    s = s.masked_fill(outside, -torch.inf)
    keyless = None
    if bias is not None or valid is not None:  # softmax of no key is NaN, and so are its derivatives: not asked for
        forbidden = outside if bias is None else outside | (bias == -torch.inf)
        keyless = forbidden.all(-1, keepdim=True)  # [(B,) G, heads or 1, T or 1, 1]
        s = s.masked_fill(keyless, 0)
    p, lse = s.softmax(-1).to(v.dtype), s.logsumexp(-1)
    if seed is not None:
        rows = rows_of(seed, q.shape[0], q.shape[-2], math.prod(size))  # [B, pixels, heads] each
        start, step = (x[:, pixel].transpose(2, 3)[..., None] for x in rows)  # [B, G, heads, T, 1]
        p = p * factors(start, step, pixel[:, None, None], dropout_p, p.dtype)
    out = p @ vs
    if keyless is not None:
        out, lse = out.masked_fill(keyless, 0), lse.masked_fill(keyless.squeeze(-1), -torch.inf)

    grid = [torch.arange(extent, device=device).view(-1, *[1] * (n - i)) for i, extent in enumerate(size, start=1)]
    group, token = partition.seat(*grid)  # [H, W]
    (group, token), dims = torch.broadcast_tensors(group, token), range(n)
    out, lse = out[:, group, :, token], lse[:, group, :, token]  # [H, W, B, heads, ...]
    out, lse = out.permute(n, *dims, n + 1, n + 2), lse.permute(n, *dims, n + 1)
    if valid is not None:
        out, lse = out.masked_fill(~valid[..., None, None], 0), lse.masked_fill(~valid[..., None], -torch.inf)
    return out, lse


def _of_tensors(axis: Axis, device: torch.device) -> Axis:
    """Its symbols as tensors: between a tensor and a symbol, exporters do not know all operators."""

    def number(n: Any) -> Any:
        return torch.scalar_tensor(n, dtype=torch.int64, device=device) if isinstance(n, torch.SymInt) else n

    return Axis(*map(number, axis))
