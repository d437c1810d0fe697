"""Interlaced sparse self-attention read aloud: Huang et al., arXiv 1907.12273, sections 3.1 and 3.2.

The paper's symbols: the affinity matrix is A = softmax(Q K^T / sqrt(d)), the context is A V. A feature map is
[B, H, W, heads, width]; nothing here is fast, all of it is differentiable in any dtype up to fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Non-local attention: every pixel attends every pixel. q, k [B, H, W, heads, K], v [B, H, W, heads, V]."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries, keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # [B, heads, H W, width]
    affinity = torch.softmax(scale * (queries @ keys.transpose(-1, -2)), dim=-1)  # [B, heads, H W, H W]
    return (affinity @ values).transpose(1, 2).reshape(v.shape)


def long_range_attention(
    q: Tensor, k: Tensor, v: Tensor, partition_size: tuple[int, int], scale: float | None = None
) -> Tensor:
    """Attention between the pixels of one remainder modulo `partition_size`, which must divide the map.

    The permutation of section 3.2: y = q_h P_h + p_h and x = q_w P_w + p_w, a group for every (p_h, p_w).
    """
    (P_h, P_w), (B, H, W) = partition_size, q.shape[:3]
    Q_h, Q_w = H // P_h, W // P_w

    def permute(x: Tensor) -> Tensor:  # [B, H, W, heads, width] -> [B P_h P_w, Q_h, Q_w, heads, width]
        x = x.reshape(B, Q_h, P_h, Q_w, P_w, *x.shape[3:])
        return x.permute(0, 2, 4, 1, 3, 5, 6).reshape(B * P_h * P_w, Q_h, Q_w, *x.shape[5:])

    context = dense_attention(permute(q), permute(k), permute(v), scale)
    context = context.reshape(B, P_h, P_w, Q_h, Q_w, *v.shape[3:])
    return context.permute(0, 3, 1, 4, 2, 5, 6).reshape(v.shape)


def short_range_attention(
    q: Tensor, k: Tensor, v: Tensor, partition_size: tuple[int, int], scale: float | None = None
) -> Tensor:
    """Attention inside windows of `partition_size` pixels, which must divide the map."""
    (P_h, P_w), (B, H, W) = partition_size, q.shape[:3]
    Q_h, Q_w = H // P_h, W // P_w

    def permute(x: Tensor) -> Tensor:  # [B, H, W, heads, width] -> [B Q_h Q_w, P_h, P_w, heads, width]
        x = x.reshape(B, Q_h, P_h, Q_w, P_w, *x.shape[3:])
        return x.permute(0, 1, 3, 2, 4, 5, 6).reshape(B * Q_h * Q_w, P_h, P_w, *x.shape[5:])

    context = dense_attention(permute(q), permute(k), permute(v), scale)
    context = context.reshape(B, Q_h, Q_w, P_h, P_w, *v.shape[3:])
    return context.permute(0, 1, 3, 2, 4, 5, 6).reshape(v.shape)


def long_range_groups(height: int, width: int, partition_size: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """The pixels of every long-range group that are on the map, as a slice of rows and one of columns."""
    for p_h in range(partition_size[0]):
        for p_w in range(partition_size[1]):
            yield slice(p_h, height, partition_size[0]), slice(p_w, width, partition_size[1])


def short_range_groups(
    height: int, width: int, partition_size: tuple[int, int], shift: tuple[int, int] = (0, 0)
) -> Iterator[tuple[slice, slice]]:
    """The pixels of every window that are on the map, as a slice of rows and one of columns.

    Windows moved down and right by `shift` leave pieces of windows on the edges they come from (Swin).
    """

    def windows(size: int, side: int, shift: int) -> Iterator[slice]:
        for start in range(shift - side if shift else 0, size, side):
            yield slice(max(start, 0), min(start + side, size))

    for rows in windows(height, partition_size[0], shift[0]):
        for columns in windows(width, partition_size[1], shift[1]):
            yield rows, columns


Groups = Callable[[int, int, tuple[int, int]], Iterator[tuple[slice, slice]]]


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, groups: Groups, partition_size: tuple[int, int], scale: float | None = None
) -> Tensor:
    """Attention among the real pixels of every group, for any partition size from 1 to the map's."""
    context = torch.zeros_like(v)
    for rows, columns in groups(q.shape[1], q.shape[2], partition_size):
        queries, keys, values = (x[:, rows, columns] for x in (q, k, v))
        context[:, rows, columns] = dense_attention(queries, keys, values, scale)
    return context


def affinity(
    q: Tensor, k: Tensor, groups: Groups, partition_size: tuple[int, int], scale: float | None = None
) -> Tensor:
    """A_long or A_short as a dense matrix [B, heads, H W, H W] over all pixels, zero between groups.

    A permutation of the pixels makes it block-diagonal; the product A_short A_long of the two has no zero.
    """
    B, H, W, heads, K = q.shape
    scale = K**-0.5 if scale is None else scale
    pixel = torch.arange(H * W).view(H, W)
    matrix = q.new_zeros(B, heads, H * W, H * W)
    for rows, columns in groups(H, W, partition_size):
        members = pixel[rows, columns].flatten()  # [T]
        queries, keys = (x.flatten(1, 2)[:, members].transpose(1, 2) for x in (q, k))  # [B, heads, T, K]
        block = torch.softmax(scale * (queries @ keys.transpose(-1, -2)), dim=-1)  # [B, heads, T, T]
        matrix[:, :, members[:, None], members] = block
    return matrix


def attention_of_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    groups: Iterable[tuple[slice, slice]],
    whole: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """out and lse in the precision of the arguments, group by group.

    Args:
        groups: the rows and columns of every group's pixels.
        whole: rows and columns of tokens in a group that is whole, by which bias numbers them.
        shift: of windows; a piece that it leaves on an edge has the last rows or columns of a whole one.
    """
    out, lse = torch.zeros_like(v), torch.zeros_like(q[..., 0])
    for pixels in groups:
        here = (slice(None), *pixels)
        h, w = q[here].shape[1:3]
        qs, ks, vs = (x[here].flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # [B, heads, T, width]
        scores = qs @ ks.mT * scale
        if bias is not None:
            y, x = (-s % t if at.start == 0 else 0 for at, t, s in zip(pixels, whole, shift, strict=True))
            tokens = ((y + torch.arange(h))[:, None] * whole[1] + x + torch.arange(w)).flatten()
            scores = scores + bias[:, tokens][:, :, tokens]
        out[here] = (scores.softmax(-1) @ vs).transpose(1, 2).unflatten(1, (h, w))
        lse[here] = scores.logsumexp(-1).transpose(1, 2).unflatten(1, (h, w))
    return out, lse
