"""The backend for any device, in PyTorch; of `contract`, which has its shapes.

A few groups at a time go through strided views of the map, so that a chunk's tokens and scores stay in cache, and
neither a permuted map nor all of the scores ever exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..axis import Run
from ..dropout import factors, rows_of
from ..partition import Partition
from . import packed
from .contract import Call, Gradients, Inputs, empty_gradients, empty_outputs, lse_dtype, unfinished_dtype
from .cosine import inverse_length, pulled_back

OPAQUE = False  # PyTorch's own operators, which modes may look into

# Bytes of a chunk's tokens and scores: on a CPU a share of the last-level cache, elsewhere enough work for a launch.
_CHUNK_BYTES_CPU = 8 << 20
_CHUNK_BYTES_ELSEWHERE = 256 << 20
_SCORES_WITH_DROPOUT = 8  # times the memory of scores: some int64 for each
_WORTH_A_CALL = 2**23  # FLOPs a thread: 256 tokens at 64 channels
# Of x [T, C] and weight [S, C] their product [T, S] by oneDNN, as Inductor calls it; None where torch is without it.
_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def keeps_output(q: Tensor, v: Tensor, partition: Partition) -> bool:
    """Never: scores are computed again from q, k and bias."""
    return False


def forward(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """``out = softmax(scale q k^T + bias) v`` inside every group, and lse, the log-sum-exp of its scores (or empty)."""
    if (table := inputs.table) is not None:
        out, lse = forward(packed.gathered(inputs), call)
        return packed.scatter(out, table, inputs.q), packed.scatter_lse(lse, table, inputs.q) if call.with_lse else lse
    return _forward(inputs, call, _numbers(inputs))


def _forward(inputs: Inputs, call: Call, numbers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    if call.partition.wraps:
        out, lse = _forward(*_rolled(inputs, call, numbers))
        return _roll_back(out, call.partition), _roll_back(lse, call.partition) if call.with_lse else lse
    scale, partition, with_lse, *_ = call
    inputs = _spread(inputs)
    (q, k, v, bias, _, valid, *_), (out, lse) = inputs, empty_outputs(inputs, with_lse)
    if not with_lse and _sdpa_is_faster(inputs, call):
        _sdpa_forward(q, k, v, bias, call, out)
        return out, lse
    maps = {"q": q, "k": k, "v": v, "out": out} | ({"lse": lse[..., None]} if with_lse else {})
    for chunk in _chunks(partition, maps | numbers, inputs):
        qs, ks, vs = chunk.load("q", call.cosine), chunk.load("k", call.cosine), chunk.load("v")  # [n, T, width]
        o, l = chunk.scratch("o", vs.shape), lse.new_empty(vs.shape[:2])
        for rows in chunk.query_blocks:
            s, p = chunk.softmax_scores(qs[:, rows], ks, rows, scale)  # [n, rows, T]
            if numbers:
                p.mul_(chunk.factors(rows, call.dropout_p))
            _product(p, vs, out=o[:, rows])
            if with_lse:
                l[:, rows] = s.to(l.dtype).logsumexp(-1)
        chunk.store("out", o)
        if with_lse:
            chunk.store("lse", l)
    if valid is not None:
        out.masked_fill_(~valid[..., None, None], 0)
        if with_lse:
            lse.masked_fill_(~valid[..., None], -torch.inf)
    return out, lse


def _sdpa_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call, out: Tensor) -> None:
    """out by torch's scaled_dot_product_attention, some groups with all their heads at a time."""
    if out.numel() == 0:
        return
    partition = call.partition
    scratch, (heads, width), n = _Scratch(q), q.shape[-2:], len(partition)
    budget = _chunk_bytes(q) // scratch.dtype.itemsize
    for piece in partition.pieces():
        tokens = math.prod(run.tokens for run in piece)
        scores = 0 if q.device.type == "cpu" else tokens  # which other devices may hold
        groups = max(1, budget // (tokens * heads * (4 * width + scores)))
        mask = None if bias is None else _crop(bias, partition, piece).to(scratch.dtype)
        mask = None if mask is None else mask.reshape(1, heads, tokens, tokens)
        # [B, groups_h, groups_w, t_h, t_w, heads, width] each
        *views, o = (partition.view(x, piece) for x in (q, k, v, out))
        for box in _boxes(o.shape[: 1 + n], groups):
            chunk, to = ([x[box] for x in views], o[box]) if box else (views, o)
            if box or scratch.dtype != q.dtype:
                chunk = [scratch(name, x.shape).copy_(x) for name, x in zip("qkv", chunk, strict=True)]
            qs, ks, vs = (x.reshape(-1, tokens, heads, width).transpose(1, 2) for x in chunk)  # [n, heads, T, width]
            attended = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=mask, scale=call.scale)
            to.copy_(attended.transpose(1, 2).reshape(to.shape))


def backward(
    inputs: Inputs, out: Tensor | None, lse: Tensor | None, do: Tensor, dlse: Tensor | None, call: Call
) -> Gradients:
    """The gradients of `forward`, from its inputs alone: scores S are computed again.

    ``P = softmax(S)``, ``dv = P^T do``, ``dP = do v^T``, ``dS = P (dP - rowsum(P dP) + dlse)``,
    ``dq = scale dS k``, ``dk = scale dS^T q``, dbias is dS summed over the groups, and over the batch if all maps share
    it; dscales is S's part without them times dS, ``q . dq`` before dq has its head's. With dropout dv and dP have its
    factors, and with cosines q and k are of length 1 here and dq and dk are pulled back.
    """
    if (table := inputs.table) is not None:
        dlse = None if dlse is None else packed.gather(dlse, table)
        found = backward(packed.gathered(inputs), None, None, packed.gather(do, table), dlse, call)
        dq, dk, dv = (packed.scatter(x, table, inputs.q) for x in found[:3])
        return found._replace(dq=dq, dk=dk, dv=dv)
    return _backward(inputs, do, dlse, call, _numbers(inputs))


def _backward(inputs: Inputs, do: Tensor, dlse: Tensor | None, call: Call, numbers: dict[str, Tensor]) -> Gradients:
    if call.partition.wraps:
        dlse = None if dlse is None else _roll(dlse, call.partition)
        inputs, unrolled, numbers = _rolled(inputs, call, numbers)
        found = _backward(inputs, _roll(do, call.partition), dlse, unrolled, numbers)
        dq, dk, dv = (_roll_back(x, call.partition) for x in found[:3])
        return found._replace(dq=dq, dk=dk, dv=dv)
    scale, partition, of_keys, shared = call.scale, call.partition, inputs.k.shape[-2], inputs.share > 1
    inputs = _spread(inputs)
    (q, k, v, _, _, valid, *_), (dq, dk, dv, dbias, dscales) = inputs, empty_gradients(inputs)
    if shared:
        dk, dv = (x.to(unfinished_dtype(x.dtype)) for x in (dk, dv))
    if valid is not None:
        do = do.masked_fill(~valid[..., None, None], 0)
        dlse = None if dlse is None else dlse.masked_fill(~valid[..., None], 0)
    dbias_sum = dbias.new_zeros(dbias.shape, dtype=lse_dtype(dbias.dtype))
    dscales_sum = dscales.new_zeros(dscales.shape, dtype=lse_dtype(dscales.dtype))
    maps = {"q": q, "k": k, "v": v, "do": do, "dq": dq, "dk": dk, "dv": dv} | numbers
    if dlse is not None:
        maps["dlse"] = dlse[..., None]
    for chunk in _chunks(partition, maps, inputs):
        qs, ks = chunk.load("q", call.cosine), chunk.load("k", call.cosine)  # [n, T, width]
        vs, dos = chunk.load("v"), chunk.load("do")
        dqs, dks, dvs = (chunk.scratch(name, x.shape) for name, x in (("dqs", qs), ("dks", ks), ("dvs", vs)))
        dls = None if dlse is None else chunk.load("dlse")  # [n, T, 1]
        db = None if chunk.bias is None else dbias_sum.new_empty(chunk.bias.shape)  # [b or 1, 1, heads, T, T]
        for rows in chunk.query_blocks:
            add = 0 if rows.start == 0 else 1  # the first block of queries overwrites dk and dv, the others add
            dp, p = chunk.softmax_scores(qs[:, rows], ks, rows, scale)  # the scores' memory becomes dP's
            kept = chunk.factors(rows, call.dropout_p) if numbers else None
            weights = p if kept is None else torch.mul(p, kept, out=chunk.scratch("weights", p.shape))
            _product(weights.mT, dos[:, rows], out=dvs, beta=add)
            _product(dos[:, rows], vs.mT, out=dp)
            if kept is not None:
                dp.mul_(kept)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype, grad_input=chunk.scratch("ds", dp.shape))
            if dls is not None:
                ds.addcmul_(p, dls[:, rows])
            if db is not None:
                of_all = (0, 1) if db.shape[0] == 1 else (1,)
                db[..., rows, :] = chunk.by_heads(ds).sum(of_all, keepdim=True, dtype=db.dtype)
            _product(ds, ks, out=dqs[:, rows], alpha=scale)
            _product(ds.mT, qs[:, rows], out=dks, alpha=scale, beta=add)
        if chunk.scales is not None:
            products = (chunk.by_heads(qs) * chunk.by_heads(dqs)).sum((0, 1, 3, 4), dtype=dscales_sum.dtype)
            dscales_sum[chunk.heads] += products
            for gradient in (dqs, dks):
                chunk.by_heads(gradient).mul_(chunk.scales)
        if call.cosine:
            for name, gradient in (("q", dqs), ("k", dks)):
                gradient.copy_(pulled_back(chunk.load(name), gradient)[0])
        for name, gradient in (("dq", dqs), ("dk", dks), ("dv", dvs)):
            chunk.store(name, gradient)
        if db is not None:
            view = chunk.view_bias(dbias_sum)
            view.add_(db.view(view.shape))
    if shared:
        dk, dv = (x.unflatten(-2, (of_keys, -1)).sum(-2).to(q.dtype) for x in (dk, dv))
    return Gradients(dq, dk, dv, dbias.copy_(dbias_sum), dscales.copy_(dscales_sum))


def _spread(inputs: Inputs) -> Inputs:
    """With a head of k and v for each of q, and zeros where no pixel is valid."""
    q, k, v, _, _, valid, *_ = inputs
    if inputs.share > 1:
        k, v = (x.repeat_interleave(inputs.share, -2) for x in (k, v))
    if valid is not None:
        q, k, v = (x.masked_fill(~valid[..., None, None], 0) for x in (q, k, v))
    return inputs._replace(q=q, k=k, v=v)


def _numbers(inputs: Inputs) -> dict[str, Tensor]:
    """What dropout knows queries and keys by, as maps [B, H, W, heads, 1]; none where nothing is dropped."""
    if inputs.seed is None:
        return {}
    maps, *size, heads, _ = inputs.q.shape
    numbers = dict(zip(("start", "step"), rows_of(inputs.seed, maps, heads, math.prod(size)), strict=True))
    numbers["pixel"] = torch.arange(math.prod(size), device=inputs.q.device)[None, :, None].expand(maps, -1, heads)
    return {name: x.unflatten(1, size)[..., None] for name, x in numbers.items()}


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
        piece: tuple[Run, ...],
        views: dict[str, Tensor],  # of the chunk, [b, groups_h, groups_w, heads, tokens_h, tokens_w, width] each, or of
        # as many groups and tokens as there are axes
        inputs: Inputs,
        maps: slice,
        heads: slice,
        query_blocks: tuple[slice, ...],  # of a group's T tokens
        scratch: _Scratch,
    ) -> None:
        self._partition, self._piece, self._views, self._maps, self.heads = partition, piece, views, maps, heads
        bias, scales = inputs.bias, inputs.scales
        self._shape = views["q"].shape[0], views["q"].shape[1 + len(partition)]  # maps and heads
        self._tokens = math.prod(run.tokens for run in piece)
        self.query_blocks, self.scratch = query_blocks, scratch
        self.bias = None  # [b or 1, 1, heads, T, T]
        if bias is not None:
            here = self.view_bias(bias)
            self.bias = here.reshape(len(here), 1, -1, self._tokens, self._tokens)
        self._keyless = None if self.bias is None else (self.bias == -torch.inf).all(-1, keepdim=True)
        self.scales = None if scales is None else scales[heads, None, None].to(scratch.dtype)  # [heads, 1, 1]
        self._outside = self.load("valid").mT == 0 if "valid" in views else None  # [n, 1, T]

    def factors(self, rows: slice, dropout_p: float) -> Tensor:
        """What dropout multiplies the weights of a block of queries by, [n, rows, T]."""
        start, step, pixel = (self._views[name].reshape(-1, self._tokens) for name in ("start", "step", "pixel"))
        return factors(start[:, rows, None], step[:, rows, None], pixel[:, None], dropout_p, self.scratch.dtype)

    def load(self, name: str, cosine: bool = False) -> Tensor:
        """The chunk of a map as [n, T, width], copied to scratch memory, with `cosine` made of length 1 there."""
        view = self._views[name]
        x = self.scratch(name, view.shape).copy_(view).view(-1, self._tokens, view.shape[-1])
        return x.mul_(inverse_length(x)) if cosine else x

    def store(self, name: str, values: Tensor) -> None:
        """Write values [n, T, width] to their pixels of a map."""
        view = self._views[name]
        view.copy_(values.view(view.shape))

    def view_bias(self, bias: Tensor) -> Tensor:
        """Bias of the chunk's maps and heads, a view: [b or 1, heads, T, T] or [..., t_h, t_w, t_h, t_w]."""
        bias = _crop(bias, self._partition, self._piece)
        return (bias[None] if bias.dim() % 2 else bias[self._maps])[:, self.heads]

    def by_heads(self, values: Tensor) -> Tensor:
        """values [n, rows, ...] as [b, groups, heads, rows, ...]."""
        maps, heads = self._shape
        return values.view(maps, -1, heads, *values.shape[1:])

    def softmax_scores(self, q: Tensor, k: Tensor, rows: slice, scale: float) -> tuple[Tensor, Tensor]:
        """Scores S = scale q k^T + bias of a block of queries, and softmax(S), 0 without keys; both [n, rows, T]."""
        s = self.scratch("s", (*q.shape[:2], k.shape[1]))
        _product(q, k.mT, out=s, alpha=scale)
        if self.scales is not None:
            self.by_heads(s).mul_(self.scales)
        if self.bias is not None:
            self.by_heads(s).add_(self.bias[..., rows, :])
        if self._outside is not None:
            s.masked_fill_(self._outside, -torch.inf)
        p = torch.softmax(s, -1, out=self.scratch("p", s.shape))
        if self._outside is not None:
            p.masked_fill_(s.amax(-1, keepdim=True) == -torch.inf, 0)
        elif self._keyless is not None:
            self.by_heads(p).masked_fill_(self._keyless[..., rows, :], 0)
        return s, p


def _product(a: Tensor, b: Tensor, *, out: Tensor, alpha: float = 1.0, beta: int = 0) -> None:
    """``out = alpha a b + beta out`` of a [n, T, C], b [n, C, S] and out [n, T, S]; beta is 0 or 1."""
    if not _is_worth_a_call(a, b):
        torch.baddbmm(out, a, b, beta=beta, alpha=alpha, out=out)
        return
    for rows, matrix, to in zip(a, b, out, strict=True):
        product = _LINEAR(rows, matrix.t(), None, "none", [], "")  # [T, S]
        if beta:
            to.add_(product, alpha=alpha)
        else:
            torch.mul(product, alpha, out=to)


def _is_worth_a_call(a: Tensor, b: Tensor) -> bool:
    """Whether each of a batch's products is faster by itself, on all threads, by oneDNN.

    It uses AVX-512 wherever it is; MKL's batched product, elsewhere as fast, does so on Intel's CPUs alone.
    """
    work = 2 * a.shape[1] * a.shape[2] * b.shape[2]
    on_cpu = a.is_cpu and a.dtype == torch.float32 and _LINEAR is not None
    return on_cpu and work >= _WORTH_A_CALL * torch.get_num_threads()


def register_flop_formulas(flop_counter: ModuleType) -> None:
    """Tell torch.utils.flop_counter what the products by oneDNN cost, where torch (2.14) does not."""
    if _LINEAR is not None and _LINEAR not in flop_counter.flop_registry:
        flop_counter.register_flop_formula(_LINEAR)(_linear_flops)


def _linear_flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(x) * weight[0]


def _chunks(partition: Partition, maps: dict[str, Tensor], inputs: Inputs) -> Iterator[_Chunk]:
    q, v, n = maps["q"], maps["v"], len(partition)
    if inputs.valid is not None:
        maps = maps | {"valid": inputs.valid[..., None, None].expand(*q.shape[:-1], 1)}
    scratch = _Scratch(q)
    budget = _chunk_bytes(q) // scratch.dtype.itemsize
    for piece in partition.pieces():
        tokens = math.prod(run.tokens for run in piece)
        rows = min(tokens, max(1, budget // tokens))
        scores = rows * (1 if inputs.seed is None else _SCORES_WITH_DROPOUT)
        attentions = max(1, budget // (tokens * (2 * q.shape[-1] + 2 * v.shape[-1] + scores)))
        query_blocks = tuple(slice(i, min(i + rows, tokens)) for i in range(0, tokens, rows))
        views = {name: partition.view(x, piece).movedim(-2, 1 + n) for name, x in maps.items()}
        for box in _boxes(views["q"].shape[: 2 + n], attentions):
            chunk = {name: x[box] for name, x in views.items()} if box else views
            which = (box[0], box[1 + n]) if box else (slice(None), slice(None))
            yield _Chunk(partition, piece, chunk, inputs, *which, query_blocks, scratch)


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


def _sdpa_is_faster(inputs: Inputs, call: Call) -> bool:
    """Whether torch's scaled_dot_product_attention beats matmul, softmax, matmul on a chunk [n, T, width] in cache.

    Its kernels want equal widths. On CPUs it was up to a width of 128 (and slower at ISA's own 256 and 512). Elsewhere
    it saves the scores' way through memory. It has one scale, no cosines and another dropout, and its mask would have
    to be made for every group.
    """
    q, _, v, bias, scales, valid, seed, _ = inputs
    if call.cosine or any(x is not None for x in (scales, valid, seed)) or (bias is not None and bias.dim() == 4):
        return False
    return q.shape[-1] == v.shape[-1] and (q.device.type != "cpu" or q.shape[-1] <= 128)


def _chunk_bytes(x: Tensor) -> int:
    return _CHUNK_BYTES_CPU if x.device.type == "cpu" else _CHUNK_BYTES_ELSEWHERE


def _crop(bias: Tensor, partition: Partition, piece: tuple[Run, ...]) -> Tensor:
    """Bias of the tokens that a piece has inside the map, a view: [..., T, T] or [..., t_h, t_w, t_h, t_w]."""
    if math.prod(run.tokens for run in piece) == partition.tokens:
        return bias
    tokens = tuple(axis.tokens for axis in partition)
    inside = tuple(slice(run.token, run.token + run.tokens) for run in piece)
    return bias.unflatten(-1, tokens).unflatten(-1 - len(tokens), tokens)[(..., *inside, *inside)]


def _rolled(inputs: Inputs, call: Call, numbers: dict[str, Tensor]) -> tuple[Inputs, Call, dict[str, Tensor]]:
    """Of maps that are rolled, so that no group lies across a seam."""
    partition = call.partition
    q, k, v = (_roll(x, partition) for x in inputs[:3])
    valid = None if inputs.valid is None else _roll(inputs.valid, partition)
    numbers = {name: _roll(x, partition) for name, x in numbers.items()}
    return inputs._replace(q=q, k=k, v=v, valid=valid), call._replace(partition=partition.unrolled()), numbers


def _roll(x: Tensor, partition: Partition) -> Tensor:
    """A map [B, H, W, ...] as the partition's `unrolled` has it: a group across a seam is no strided view."""
    return x.roll(*_shifts(partition, -1))


def _roll_back(x: Tensor, partition: Partition) -> Tensor:
    return x.roll(*_shifts(partition, 1))


def _shifts(partition: Partition, sign: int) -> tuple[list[int], list[int]]:
    """By how many pixels which dimensions are rolled."""
    wrapped = [(sign * axis.origin, dim) for dim, axis in enumerate(partition, start=1) if axis.wraps]
    return [shift for shift, _ in wrapped], [dim for _, dim in wrapped]
