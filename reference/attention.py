"""Interlaced sparse self-attention read aloud: Huang et al., arXiv 1907.12273, sections 3.1 and 3.2.

The paper's symbols: the affinity matrix is A = softmax(Q K^T / sqrt(d)), the context is A V. A feature map is
[B, H, W, heads, width], a line or a volume has one axis or three; nothing here is fast, all of it is differentiable in
any dtype up to fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor

Size = Sequence[int]  # of a map (H, W), or of a line (L,) or a volume (D, H, W)
Group = tuple[slice, ...]  # its pixels, as a slice of every axis


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Non-local attention: every pixel attends every pixel. q, k [B, H, W, heads, K], v [B, H, W, heads, V]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries, keys, values = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))  # [B, heads, H W, width]
    affinity = torch.softmax(scale * (queries @ keys.transpose(-1, -2)), dim=-1)  # [B, heads, H W, H W]
    return (affinity @ values).transpose(1, 2).reshape(v.shape)


def long_range_attention(q: Tensor, k: Tensor, v: Tensor, partition_size: Size, scale: float | None = None) -> Tensor:
    """Attention between the pixels of one remainder modulo `partition_size`, which must divide the map.

    The permutation of section 3.2: y = q_h P_h + p_h and x = q_w P_w + p_w, a group for every (p_h, p_w).
    """
    return _permuted_attention(q, k, v, partition_size, scale, group=2, token=1)


def short_range_attention(q: Tensor, k: Tensor, v: Tensor, partition_size: Size, scale: float | None = None) -> Tensor:
    """Attention inside windows of `partition_size` pixels, which must divide the map: a group for every (q_h, q_w)."""
    return _permuted_attention(q, k, v, partition_size, scale, group=1, token=2)


def _permuted_attention(
    q: Tensor, k: Tensor, v: Tensor, partition_size: Size, scale: float | None, group: int, token: int
) -> Tensor:
    """Attention between pixels that share the quotients (`group` 1) or the remainders (2) of their coordinates by P."""
    B, size = q.shape[0], q.shape[1:-2]
    split = [part for extent, P in zip(size, partition_size, strict=True) for part in (extent // P, P)]
    rank = len(split)  # of [B, Q_h, P_h, Q_w, P_w, heads, width], without the last two and the first
    order = 0, *range(group, rank + 1, 2), *range(token, rank + 1, 2), rank + 1, rank + 2

    def permute(x: Tensor) -> Tensor:  # [B, H, W, heads, width] -> [B groups, tokens_h, tokens_w, heads, width]
        return x.reshape(B, *split, *x.shape[-2:]).permute(order).flatten(0, len(size))

    context = dense_attention(permute(q), permute(k), permute(v), scale)
    permuted = v.reshape(B, *split, *v.shape[-2:]).permute(order).shape
    return context.reshape(permuted).permute(*map(order.index, range(rank + 3))).reshape(v.shape)


def long_range_groups(size: Size, partition_size: Size) -> Iterator[Group]:
    """The pixels of every long-range group that are on the map, as slices of rows and of columns."""
    yield from product(*[_remainders(*of_axis) for of_axis in zip(size, partition_size, strict=True)])


def short_range_groups(size: Size, partition_size: Size, shift: Size | None = None) -> Iterator[Group]:
    """The pixels of every window that are on the map, as slices of rows and of columns.

    Windows moved down and right by `shift` leave pieces of windows on the edges they come from (Swin).
    """
    shift = [0] * len(size) if shift is None else shift
    yield from product(*[_windows(*of_axis) for of_axis in zip(size, partition_size, shift, strict=True)])


def _remainders(size: int, interval: int) -> Iterator[slice]:
    for remainder in range(interval):
        yield slice(remainder, size, interval)


def _windows(size: int, side: int, shift: int) -> Iterator[slice]:
    for start in range(shift - side if shift else 0, size, side):
        yield slice(max(start, 0), min(start + side, size))


Groups = Callable[[Size, Size], Iterator[Group]]


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: Groups, partition_size: Size, scale: float | None = None
) -> Tensor:
    """Attention among the real pixels of every group, for any partition size from 1 to the map's."""
    context = torch.zeros_like(v)
    for pixels in groups(q.shape[1:-2], partition_size):
        here = slice(None), *pixels
        context[here] = dense_attention(q[here], k[here], v[here], scale)
    return context


def affinity(q: Tensor, k: Tensor, groups: Groups, partition_size: Size, scale: float | None = None) -> Tensor:
    """A_long or A_short as a dense matrix [B, heads, H W, H W] over all pixels, zero between groups.

    A permutation of the pixels makes it block-diagonal; the product A_short A_long of the two has no zero.
    """
    B, *size, heads, K = q.shape
    scale = K**-0.5 if scale is None else scale
    pixel = torch.arange(prod(size)).view(size)
    matrix = q.new_zeros(B, heads, prod(size), prod(size))
    for pixels in groups(size, partition_size):
        members = pixel[pixels].flatten()  # [T]
        queries, keys = (x.flatten(1, -3)[:, members].transpose(1, 2) for x in (q, k))  # [B, heads, T, K]
        block = torch.softmax(scale * (queries @ keys.transpose(-1, -2)), dim=-1)  # [B, heads, T, T]
        matrix[:, :, members[:, None], members] = block
    return matrix


def attention_of_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float | Tensor,
    groups: Iterable[Group],
    whole: Size,
    shift: Size | None = None,
    *,
    valid: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_weight: Tensor | None = None,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse in the precision of the arguments, group by group; 0 and minus infinity of a query without keys.

    Args:
        k, v: each of their heads serves as many neighbouring heads of q.
        bias: [heads or 1, T, T], or one for each map, [B, heads or 1, T, T].
        scale: a number, or one for each head, [heads].
        groups: the rows and columns of every group's pixels.
        whole: rows and columns of tokens in a group that is whole, by which bias numbers them.
        shift: of windows; a piece that it leaves on an edge has the last rows or columns of a whole one.
        valid: [B, H, W], which pixels exist.
        extra_k, extra_v: [B, n, heads, width], one more group of tokens that all others see.
        extra_weight: [n] or [B or 1, H, W, n], how many copies of them.
        factors: [B, H, W, heads, T + n], of the weights behind softmax, 0 where dropout drops one.
    """
    shift = [0] * len(whole) if shift is None else shift
    scale = scale[:, None, None] if isinstance(scale, Tensor) else scale
    if valid is not None:
        q, k, v = (x.masked_fill(~valid[..., None, None], 0) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[-2] // max(1, x.shape[-2]), -2) for x in (k, v))
    out, lse = torch.zeros_like(v), torch.zeros_like(q[..., 0])
    masks = bias is not None or valid is not None or extra_weight is not None
    for pixels in groups:
        here = slice(None), *pixels
        size = q[here].shape[1:-2]
        qs, ks, vs = (x[here].flatten(1, -3).transpose(1, 2) for x in (q, k, v))  # [B, heads, T, width]
        scores = qs @ ks.mT * scale
        if bias is not None or factors is not None:
            first = [-s % t if at.start == 0 else 0 for at, t, s in zip(pixels, whole, shift, strict=True)]
            there = tuple(slice(f, f + n) for f, n in zip(first, size, strict=True))
            tokens = torch.arange(prod(whole)).view(*whole)[there].flatten()
        if bias is not None:
            scores = scores + bias[..., tokens, :][..., tokens]
        exist = None if valid is None else valid[here].flatten(1)[:, None, :, None]  # [B, 1, T, 1]
        if exist is not None:
            scores = scores.masked_fill(~exist.mT, -torch.inf)
        if extra_k is not None and extra_v is not None:
            more = qs @ extra_k.transpose(1, 2).mT * scale  # [B, heads, T, n]
            if extra_weight is not None:
                many = extra_weight if extra_weight.dim() == 1 else extra_weight[here].flatten(1, -2)[:, None]
                more = more + many.log()
            scores, vs = torch.cat([scores, more], -1), torch.cat([vs, extra_v.transpose(1, 2)], -2)
        if masks:
            keyless = (scores == -torch.inf).all(-1, keepdim=True)  # of which softmax is NaN
            keyless = keyless if exist is None else keyless | ~exist
            scores = scores.masked_fill(keyless, 0)
        p, log_sum = scores.softmax(-1).to(vs.dtype), scores.logsumexp(-1, keepdim=True).to(lse.dtype)
        if masks:
            p, log_sum = p.masked_fill(keyless, 0), log_sum.masked_fill(keyless, -torch.inf)
        if factors is not None:
            columns = torch.cat([tokens, torch.arange(prod(whole), factors.shape[-1])])
            p = p * factors[here].flatten(1, -3).transpose(1, 2)[..., columns]
        out[here] = (p @ vs).transpose(1, 2).unflatten(1, size)
        lse[here] = log_sum[..., 0].transpose(1, 2).unflatten(1, size)
    return out, lse
