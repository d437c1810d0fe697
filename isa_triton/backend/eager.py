"""The backend for any device, in PyTorch; of `contract`, which has its shapes.

A few groups at a time go through strided views of the map, so that a chunk's tokens and scores stay in cache, and
neither a permuted map nor all of the scores ever exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ..partition import Partition, Run
from .contract import Call, empty_gradients, empty_outputs, lse_dtype

OPAQUE = False  # PyTorch's own operators, which modes may look into

# Bytes of a chunk's tokens and scores: on a CPU a share of the last-level cache, elsewhere enough work for a launch.
_CHUNK_BYTES_CPU = 8 << 20
_CHUNK_BYTES_ELSEWHERE = 256 << 20
_WORTH_A_CALL = 2**25  # FLOPs a thread: 256 tokens at ISA's 256 channels


def keeps_output(q: Tensor, v: Tensor, partition: Partition) -> bool:
    """Never: scores are computed again from q, k and bias."""
    return False


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """``out = softmax(scale q k^T + bias) v`` inside every group, and lse, the log-sum-exp of its scores (or empty)."""
    scale, partition, with_lse, _ = call
    out, lse = empty_outputs(q, v, with_lse)
    if not with_lse and _sdpa_is_faster(q, v):
        _sdpa_forward(q, k, v, bias, call, out)
        return out, lse
    maps = {"q": q, "k": k, "v": v, "out": out} | ({"lse": lse[..., None]} if with_lse else {})
    for chunk in _chunks(partition, maps, bias):
        qs, ks, vs = chunk.load("q"), chunk.load("k"), chunk.load("v")  # [n, T, width]
        o, l = chunk.scratch("o", vs.shape), lse.new_empty(vs.shape[:2])
        for rows in chunk.query_blocks:
            s, p = chunk.softmax_scores(qs[:, rows], ks, rows, scale)  # [n, rows, T]
            _product(p, vs, out=o[:, rows])
            if with_lse:
                l[:, rows] = s.to(l.dtype).logsumexp(-1)
        chunk.store("out", o)
        if with_lse:
            chunk.store("lse", l)
    return out, lse


def _sdpa_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call, out: Tensor) -> None:
    """out by torch's scaled_dot_product_attention, some groups with all their heads at a time."""
    if out.numel() == 0:
        return
    partition = call.partition
    scratch, (heads, width) = _Scratch(q), q.shape[3:]
    budget = _chunk_bytes(q) // scratch.dtype.itemsize
    for piece in partition.pieces():
        tokens = piece[0].tokens * piece[1].tokens
        scores = 0 if q.device.type == "cpu" else tokens  # which other devices may hold
        groups = max(1, budget // (tokens * heads * (4 * width + scores)))
        mask = None if bias is None else _crop(bias, partition, piece).to(scratch.dtype)
        mask = None if mask is None else mask.reshape(1, heads, tokens, tokens)
        # [B, groups_h, groups_w, t_h, t_w, heads, width] each
        *views, o = (partition.view(x, piece) for x in (q, k, v, out))
        for box in _boxes(o.shape[:3], groups):
            chunk, to = ([x[box] for x in views], o[box]) if box else (views, o)
            if box or scratch.dtype != q.dtype:
                chunk = [scratch(name, x.shape).copy_(x) for name, x in zip("qkv", chunk, strict=True)]
            qs, ks, vs = (x.reshape(-1, tokens, heads, width).transpose(1, 2) for x in chunk)  # [n, heads, T, width]
            attended = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, scale=call.scale)
            to.copy_(attended.transpose(1, 2).reshape(to.shape))


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    do: Tensor,
    dlse: Tensor | None,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients dq, dk, dv, dbias (or empty) of `forward`, from its inputs alone: scores S are computed again.

    ``P = softmax(S)``, ``dv = P^T do``, ``dP = do v^T``, ``dS = P (dP - rowsum(P dP) + dlse)``,
    ``dq = scale dS k``, ``dk = scale dS^T q``, and dbias is dS summed over batch and groups.
    """
    scale, partition = call.scale, call.partition
    dq, dk, dv, dbias = empty_gradients(q, k, v, bias)
    dbias_sum = dbias.new_zeros(dbias.shape, dtype=lse_dtype(dbias.dtype))
    maps = {"q": q, "k": k, "v": v, "do": do, "dq": dq, "dk": dk, "dv": dv}
    if dlse is not None:
        maps["dlse"] = dlse[..., None]
    for chunk in _chunks(partition, maps, bias):
        qs, ks, vs, dos = chunk.load("q"), chunk.load("k"), chunk.load("v"), chunk.load("do")  # [n, T, width]
        dqs, dks, dvs = (chunk.scratch(name, x.shape) for name, x in (("dqs", qs), ("dks", ks), ("dvs", vs)))
        dls = None if dlse is None else chunk.load("dlse")  # [n, T, 1]
        db = None if chunk.bias is None else dbias_sum.new_empty(chunk.bias.shape)
        for rows in chunk.query_blocks:
            add = 0 if rows.start == 0 else 1  # the first block of queries overwrites dk and dv, the others add
            dp, p = chunk.softmax_scores(qs[:, rows], ks, rows, scale)  # the scores' memory becomes dP's
            _product(p.mT, dos[:, rows], out=dvs, beta=add)
            _product(dos[:, rows], vs.mT, out=dp)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=chunk.scratch("ds", dp.shape))
            if dls is not None:
                ds.addcmul_(p, dls[:, rows])
            if db is not None:
                db[:, rows] = ds.unflatten(0, (-1, db.shape[0])).sum(0, dtype=db.dtype)
            _product(ds, ks, out=dqs[:, rows], alpha=scale)
            _product(ds.mT, qs[:, rows], out=dks, alpha=scale, beta=add)
        for name, gradient in (("dq", dqs), ("dk", dks), ("dv", dvs)):
            chunk.store(name, gradient)
        if db is not None:
            view = chunk.view_bias(dbias_sum)
            view.add_(db.view(view.shape))
    return dq, dk, dv, dbias.copy_(dbias_sum)


class _Scratch:
    """Memory by name that the next chunk uses again: pages fresh from the system cost more than the copy into them."""

    def __init__(self, like: Tensor) -> None:
        on_cpu = like.device.type == "cpu"
        self.dtype = lse_dtype(like.dtype) if on_cpu else like.dtype  # CPUs multiply halves far more slowly
        self._like = like
        self._memory: dict[str, Tensor] = {}
        self._views: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        view = self._views.get((name, shape))
        if view is None:
            size, memory = math.prod(shape), self._memory.get(name)
            if memory is None or memory.numel() < size:
                view = self._memory[name] = self._like.new_empty(shape, dtype=self.dtype)
            else:
                view = memory.view(-1)[:size].view(shape)
            self._views[name, shape] = view
        return view


class _Chunk:
    """Some groups of one piece of a partition, whose n (batch, group, head) attentions are computed together."""

    def __init__(
        self,
        partition: Partition,
        piece: tuple[Run, Run],
        views: dict[str, Tensor],  # of the chunk, [b, groups_h, groups_w, heads, tokens_h, tokens_w, width] each
        bias: Tensor | None,
        heads: slice,
        query_blocks: tuple[slice, ...],  # of a group's T tokens
        scratch: _Scratch,
    ) -> None:
        self._partition, self._piece, self._views, self._heads = partition, piece, views, heads
        self._tokens, self.query_blocks, self.scratch = piece[0].tokens * piece[1].tokens, query_blocks, scratch
        self.bias = None if bias is None else self.view_bias(bias).reshape(-1, self._tokens, self._tokens)
        self._keyless = None if self.bias is None else (self.bias == -torch.inf).all(-1, keepdim=True)  # [heads, T, 1]

    def load(self, name: str) -> Tensor:
        """The chunk of a map as [n, T, width], copied to scratch memory."""
        view = self._views[name]
        return self.scratch(name, view.shape).copy_(view).view(-1, self._tokens, view.shape[-1])

    def store(self, name: str, values: Tensor) -> None:
        """Write values [n, T, width] to their pixels of a map."""
        view = self._views[name]
        view.copy_(values.view(view.shape))

    def view_bias(self, bias: Tensor) -> Tensor:
        """Bias of the chunk's heads, a view: [heads, T, T] or [heads, t_h, t_w, t_h, t_w]."""
        return _crop(bias, self._partition, self._piece)[self._heads]

    def softmax_scores(self, q: Tensor, k: Tensor, rows: slice, scale: float) -> tuple[Tensor, Tensor]:
        """Scores S = scale q k^T + bias of a block of queries, and softmax(S), 0 without keys; both [n, rows, T]."""
        s = self.scratch("s", (*q.shape[:2], k.shape[1]))
        _product(q, k.mT, out=s, alpha=scale)
        if self.bias is not None:
            s.unflatten(0, (-1, self.bias.shape[0])).add_(self.bias[:, rows])
        p = torch.softmax(s, -1, out=self.scratch("p", s.shape))
        if self._keyless is not None:
            p.unflatten(0, (-1, self._keyless.shape[0])).masked_fill_(self._keyless[:, rows], 0)
        return s, p


def _product(a: Tensor, b: Tensor, *, out: Tensor, alpha: float = 1.0, beta: int = 0) -> None:
    """``out = alpha a b + beta out`` of a [n, T, C], b [n, C, S] and out [n, T, S]; beta is 0 or 1."""
    if not _is_worth_a_call(a, b):
        torch.baddbmm(out, a, b, beta=beta, alpha=alpha, out=out)
        return
    for rows, matrix, to in zip(a, b, out, strict=True):
        pixels = rows.contiguous()[None, :, None].permute(0, 3, 1, 2)  # [1, C, T, 1]
        product = F.conv2d(pixels, matrix.t()[..., None, None], dilation=2)[0, :, :, 0].t()  # [T, S]
        if beta:
            to.add_(product, alpha=alpha)
        else:
            torch.mul(product, alpha, out=to)


def _is_worth_a_call(a: Tensor, b: Tensor) -> bool:
    """Whether each of a batch's products is faster by itself, on all threads, by oneDNN (`maps` says why)."""
    work = 2 * a.shape[1] * a.shape[2] * b.shape[2]
    on_cpu = a.is_cpu and a.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return on_cpu and work >= _WORTH_A_CALL * torch.get_num_threads()


def _chunks(partition: Partition, maps: dict[str, Tensor], bias: Tensor | None) -> Iterator[_Chunk]:
    q, v = maps["q"], maps["v"]
    scratch = _Scratch(q)
    budget = _chunk_bytes(q) // scratch.dtype.itemsize
    for piece in partition.pieces():
        tokens = piece[0].tokens * piece[1].tokens
        rows = min(tokens, max(1, budget // tokens))
        attentions = max(1, budget // (tokens * (2 * q.shape[-1] + 2 * v.shape[-1] + rows)))
        query_blocks = tuple(slice(i, min(i + rows, tokens)) for i in range(0, tokens, rows))
        views = {name: partition.view(x, piece).movedim(-2, 3) for name, x in maps.items()}
        for box in _boxes(views["q"].shape[:4], attentions):
            chunk = {name: x[box] for name, x in views.items()} if box else views
            yield _Chunk(partition, piece, chunk, bias, box[3] if box else slice(None), query_blocks, scratch)


def _boxes(extents: Sequence[int], volume: int) -> Iterator[tuple[slice, ...]]:
    """Boxes of at most `volume` elements that tile `extents`, the last dimension filled first; () if one holds all."""
    if 0 < math.prod(extents) <= volume:
        yield ()
        return
    steps: list[int] = []
    for extent in reversed(extents):
        steps.insert(0, max(1, min(extent, volume)))
        volume //= steps[0]
    for corner in product(*(range(0, extent, step) for extent, step in zip(extents, steps, strict=True))):
        yield tuple(slice(start, start + step) for start, step in zip(corner, steps, strict=True))


def _sdpa_is_faster(q: Tensor, v: Tensor) -> bool:
    """Whether torch's scaled_dot_product_attention beats matmul, softmax, matmul on a chunk [n, T, width] in cache.

    Its kernels want equal widths. On CPUs it was up to a width of 128 (and slower at ISA's own 256 and 512). Elsewhere
    it saves the scores' way through memory.
    """
    return q.shape[-1] == v.shape[-1] and (q.device.type != "cpu" or q.shape[-1] <= 128)


def _chunk_bytes(x: Tensor) -> int:
    return _CHUNK_BYTES_CPU if x.device.type == "cpu" else _CHUNK_BYTES_ELSEWHERE


def _crop(bias: Tensor, partition: Partition, piece: tuple[Run, Run]) -> Tensor:
    """Bias of the tokens that a piece has inside the map, a view: [heads, T, T] or [heads, t_h, t_w, t_h, t_w]."""
    if piece[0].tokens * piece[1].tokens == partition.tokens:
        return bias
    tokens = (partition.h.tokens, partition.w.tokens)
    h, w = (slice(run.token, run.token + run.tokens) for run in piece)
    return bias.unflatten(2, tokens).unflatten(1, tokens)[:, h, w, h, w]
