"""Attention over a partition in plain PyTorch, on any device.

`forward` and `backward` take a few groups at a time through strided views of the map, so that a chunk's tokens and
scores stay in cache, and neither a permuted map nor all of the scores ever exist. `plain` is the same function as one
differentiable expression, for derivatives of higher order.

Shapes, here and in `ops`: q, k [B, H, W, heads, K]; v, out [B, H, W, heads, V]; lse [B, H, W, heads];
bias [heads, tokens, tokens] or None.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .partition import Partition, Run

# Bytes of a chunk's tokens and scores: on a CPU a share of the last-level cache, elsewhere enough work for a launch.
_CHUNK_BYTES_CPU = 8 << 20
_CHUNK_BYTES_ELSEWHERE = 256 << 20


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64: sums over half-precision scores are kept in fp32."""
    return torch.promote_types(dtype, torch.float32)


def empty_outputs(q: Tensor, v: Tensor, with_lse: bool) -> tuple[Tensor, Tensor]:
    """Uninitialised out and lse, as every backend returns them."""
    return q.new_empty(v.shape), q.new_empty(q.shape[:-1] if with_lse else (0,), dtype=lse_dtype(q.dtype))


def empty_gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Uninitialised dq, dk, dv and dbias, as every backend returns them."""
    dbias = q.new_empty(0 if bias is None else bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, partition: Partition, with_lse: bool
) -> tuple[Tensor, Tensor]:
    """``out = softmax(scale q k^T + bias) v`` inside every group, and lse, the log-sum-exp of its scores (or empty)."""
    out, lse = empty_outputs(q, v, with_lse)
    scratch = _Scratch(q)
    for chunk in _chunks(partition, q, v):
        qs, ks, vs = (chunk.load(x, scratch, name) for x, name in ((q, "q"), (k, "k"), (v, "v")))  # [n, T, width]
        if not with_lse and bias is None and _fused_is_faster(qs, vs):
            chunk.store(out, F.scaled_dot_product_attention(qs[:, None], ks[:, None], vs[:, None], scale=scale))
            continue
        b = chunk.load_bias(bias)  # [heads, T, T]
        o, l = scratch("o", vs.shape), lse.new_empty(vs.shape[:2])
        for rows in chunk.query_blocks:
            s, p = _softmax_scores(qs[:, rows], ks, b, rows, scale, scratch)  # [n, rows, T]
            torch.bmm(p, vs, out=o[:, rows])
            if with_lse:
                l[:, rows] = s.to(l.dtype).logsumexp(-1)
        chunk.store(out, o)
        if with_lse:
            chunk.store(lse[..., None], l)
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    do: Tensor,
    dlse: Tensor | None,
    scale: float,
    partition: Partition,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients dq, dk, dv, dbias (or empty) of `forward` from its inputs alone: scores S are computed again.

    ``P = softmax(S)``, ``dv = P^T do``, ``dP = do v^T``, ``dS = P (dP - rowsum(P dP) + dlse)``,
    ``dq = scale dS k``, ``dk = scale dS^T q``, and dbias is dS summed over batch and groups.
    """
    dq, dk, dv, dbias = empty_gradients(q, k, v, bias)
    dbias_sum = dbias.new_zeros(dbias.shape, dtype=lse_dtype(dbias.dtype))
    scratch = _Scratch(q)
    for chunk in _chunks(partition, q, v):
        loads = ((q, "q"), (k, "k"), (v, "v"), (do, "do"))
        qs, ks, vs, dos = (chunk.load(x, scratch, name) for x, name in loads)  # [n, T, width]
        dqs, dks, dvs = scratch("dq", qs.shape), scratch("dk", ks.shape), scratch("dv", vs.shape)
        dls = None if dlse is None else chunk.load(dlse[..., None].to(q.dtype), scratch, "dlse")  # [n, T, 1]
        b = chunk.load_bias(bias)  # [heads, T, T]
        db = None if b is None else dbias_sum.new_empty(b.shape)
        for rows in chunk.query_blocks:
            add = 0 if rows.start == 0 else 1  # the first block of queries overwrites dk and dv, the others add
            dp, p = _softmax_scores(qs[:, rows], ks, b, rows, scale, scratch)  # the scores' memory becomes dP's
            torch.baddbmm(dvs, p.mT, dos[:, rows], beta=add, out=dvs)
            torch.bmm(dos[:, rows], vs.mT, out=dp)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=scratch("ds", dp.shape))
            if dls is not None:
                ds.addcmul_(p, dls[:, rows])
            if db is not None:
                db[:, rows] = ds.unflatten(0, (-1, db.shape[0])).sum(0, dtype=db.dtype)
            torch.baddbmm(dqs[:, rows], ds, ks, beta=0, alpha=scale, out=dqs[:, rows])
            torch.baddbmm(dks, ds.mT, qs[:, rows], beta=add, alpha=scale, out=dks)
        chunk.store(dq, dqs)
        chunk.store(dk, dks)
        chunk.store(dv, dvs)
        if db is not None:
            chunk.add_bias(dbias_sum, db)
    return dq, dk, dv, dbias.copy_(dbias_sum)


def plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, partition: Partition
) -> tuple[Tensor, Tensor]:
    """out and lse as one expression that PyTorch differentiates and vectorises to any order; it holds all scores."""
    (height, width), device = partition.size, q.device
    group, token = torch.arange(partition.groups, device=device), torch.arange(partition.tokens, device=device)
    y, x, inside = partition.coordinates(group[:, None], token)  # [G, T]
    pixel = torch.where(inside, y * width + x, 0)
    qs, ks, vs = (t.flatten(1, 2)[:, pixel].movedim(-2, 2) for t in (q, k, v))  # [B, G, heads, T, width]
    s = scale * (qs @ ks.mT)
    s = (s if bias is None else s + bias).masked_fill(~inside[:, None, None], -torch.inf)

    y, x = torch.arange(height, device=device)[:, None], torch.arange(width, device=device)
    group, token = partition.seat(y, x)  # [H, W]
    out, lse = s.softmax(-1) @ vs, s.to(lse_dtype(s.dtype)).logsumexp(-1)
    return out[:, group, :, token].movedim(2, 0), lse[:, group, :, token].movedim(2, 0)


class _Scratch:
    """Memory by name that the next chunk uses again: pages fresh from the system cost more than the copy into them."""

    def __init__(self, like: Tensor) -> None:
        self._like, self._memory = like, dict[str, Tensor]()

    def __call__(self, name: str, shape: Sequence[int]) -> Tensor:
        size = math.prod(shape)
        memory = self._memory.get(name)
        if memory is None or memory.numel() < size:
            memory = self._memory[name] = self._like.new_empty(size)
        return memory[:size].view(*shape)


class _Chunk(NamedTuple):
    """Some groups of one piece of a partition, whose n (batch, group, head) attentions are computed together."""

    partition: Partition
    piece: tuple[Run, Run]
    box: tuple[slice, ...]  # of (batch, groups_h, groups_w, heads)
    query_blocks: tuple[slice, ...]  # of a group's T tokens

    def load(self, x: Tensor, scratch: _Scratch, name: str) -> Tensor:
        """The chunk of x [B, H, W, heads, width] as [n, T, width], in scratch memory."""
        view = self._view(x)
        return scratch(name, view.shape).copy_(view).flatten(0, 3).flatten(1, 2)

    def store(self, x: Tensor, values: Tensor) -> None:
        """Write values [n, T, width] to their pixels of x [B, H, W, heads, width]."""
        view = self._view(x)
        view.copy_(values.view(view.shape))

    def load_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias [heads, T, T] of the chunk's heads and of the tokens inside the map."""
        return None if bias is None else self._view_bias(bias).flatten(3, 4).flatten(1, 2)

    def add_bias(self, bias: Tensor, values: Tensor) -> None:
        """Add values [heads, T, T] to their place in bias."""
        view = self._view_bias(bias)
        view.add_(values.view(view.shape))

    def _view(self, x: Tensor) -> Tensor:
        seated = self.partition.view(x, self.piece).movedim(-2, 3)  # [B, g_h, g_w, heads, t_h, t_w, width]
        return seated[self.box]

    def _view_bias(self, bias: Tensor) -> Tensor:
        tokens = (self.partition.h.tokens, self.partition.w.tokens)
        h, w = (slice(run.tokens) for run in self.piece)
        return bias.unflatten(2, tokens).unflatten(1, tokens)[self.box[3], h, w, h, w]


def _chunks(partition: Partition, q: Tensor, v: Tensor) -> Iterator[_Chunk]:
    budget = (_CHUNK_BYTES_CPU if q.device.type == "cpu" else _CHUNK_BYTES_ELSEWHERE) // q.element_size()
    for piece in partition.pieces():
        tokens = piece[0].tokens * piece[1].tokens
        rows = min(tokens, max(1, budget // tokens))
        attentions = max(1, budget // (tokens * (2 * q.shape[-1] + 2 * v.shape[-1] + rows)))
        query_blocks = tuple(slice(i, min(i + rows, tokens)) for i in range(0, tokens, rows))
        extents = (q.shape[0], piece[0].groups, piece[1].groups, q.shape[3])
        for box in _boxes(extents, attentions):
            yield _Chunk(partition, piece, box, query_blocks)


def _boxes(extents: tuple[int, ...], volume: int) -> Iterator[tuple[slice, ...]]:
    """Boxes of at most `volume` elements that tile `extents`, the last dimension filled first."""
    steps: list[int] = []
    for extent in reversed(extents):
        steps.insert(0, max(1, min(extent, volume)))
        volume //= steps[0]
    for corner in product(*(range(0, extent, step) for extent, step in zip(extents, steps, strict=True))):
        yield tuple(slice(start, start + step) for start, step in zip(corner, steps, strict=True))


def _softmax_scores(
    q: Tensor, k: Tensor, bias: Tensor | None, rows: slice, scale: float, scratch: _Scratch
) -> tuple[Tensor, Tensor]:
    """Scores S = scale q k^T + bias of a block of queries, and softmax(S); both [n, rows, T]."""
    s = scratch("s", (*q.shape[:2], k.shape[1]))
    torch.baddbmm(s, q, k.mT, beta=0, alpha=scale, out=s)
    if bias is not None:
        s.unflatten(0, (-1, bias.shape[0])).add_(bias[:, rows])
    return s, torch.softmax(s, -1, out=scratch("p", s.shape))


def _fused_is_faster(q: Tensor, v: Tensor) -> bool:
    """Whether torch's fused attention beats matmul, softmax, matmul on a chunk [n, T, width] in cache.

    Its kernels want equal widths. Measured on CPUs: 1.1-1.4x faster from 256 tokens on at widths up to 128, slower
    below (and at ISA's own 256 and 512). Elsewhere it saves the scores' way through memory.
    """
    if q.shape[-1] != v.shape[-1]:
        return False
    return q.device.type != "cpu" or (q.shape[-1] <= 128 and q.shape[1] >= 256)
