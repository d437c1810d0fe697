"""Attention over a partition as one expression, which PyTorch differentiates and vectorises to any order.

It holds all scores: made for derivatives beyond the first and for export, not to be fast.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..axis import Axis
from ..partition import Partition
from .contract import lse_dtype


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, partition: Partition
) -> tuple[Tensor, Tensor]:
    """out and lse, as `contract.Backend.forward` returns them."""
    size, device, n = partition.size, q.device, len(partition)
    q, k, v = (x.expand(-1, *size, -1, -1) for x in (q, k, v))  # refuses other sizes where a graph meets them
    group, token = torch.arange(partition.groups, device=device), torch.arange(partition.tokens, device=device)
    partition = Partition(*(_of_tensors(axis, device) for axis in partition))
    *place, inside = partition.coordinates(group[:, None], token)  # [G, T] each
    pixel = place[0]
    for here, extent in zip(place[1:], size[1:], strict=True):
        pixel = pixel * extent + here
    pixel = torch.where(inside, pixel, 0)
    qs, ks, vs = (t.flatten(1, n)[:, pixel].transpose(2, 3) for t in (q, k, v))  # [B, G, heads, T, width]
    outside = ~inside[:, None, None]  # [G, 1, 1, T]
    s = (scale * (qs @ ks.transpose(-1, -2))).to(lse_dtype(q.dtype))  # in which the largest bias and a score are finite
    s = (s if bias is None else s + bias).masked_fill(outside, -torch.inf)
    if bias is not None:  # softmax of no key is NaN, and so are its derivatives: it is not asked for
        keyless = (outside | (bias == -torch.inf)).all(-1, keepdim=True)  # [G, heads, T, 1]
        s = s.masked_fill(keyless, 0)
    out, lse = s.softmax(-1).to(v.dtype) @ vs, s.logsumexp(-1)
    if bias is not None:
        out, lse = out.masked_fill(keyless, 0), lse.masked_fill(keyless.squeeze(-1), -torch.inf)

    grid = [torch.arange(extent, device=device).view(-1, *[1] * (n - i)) for i, extent in enumerate(size, start=1)]
    group, token = partition.seat(*grid)  # [H, W]
    (group, token), axes = torch.broadcast_tensors(group, token), range(n)
    out, lse = out[:, group, :, token], lse[:, group, :, token]  # [H, W, B, heads, ...]
    return out.permute(n, *axes, n + 1, n + 2), lse.permute(n, *axes, n + 1)


def _of_tensors(axis: Axis, device: torch.device) -> Axis:
    """Its symbols as tensors: between a tensor and a symbol, exporters do not know all operators."""

    def number(n: Any) -> Any:
        return torch.scalar_tensor(n, dtype=torch.int64, device=device) if isinstance(n, torch.SymInt) else n

    return Axis(*map(number, axis))
