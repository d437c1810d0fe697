"""Attention over a partition, as users call it: the arguments are checked and a backend is chosen."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from math import prod
from typing import Any

import torch
from torch import Tensor

from . import _tracing, ops, replays
from .axis import along, whole
from .backend import check_backend, choose
from .backend.contract import Call, Inputs
from .backend.cosine import normalised
from .batch import PartitionBatch
from .dropout import factors, rows_of
from .partition import Partition, check_partition, flat_index

_SEEDS = 2**63
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def partitioned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partition: Partition | PartitionBatch,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    valid: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_weight: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    cosine: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention among the tokens of every group of a feature map, without moving a pixel.

    ``out = softmax(scale * q k^T + bias) v`` inside each group (Huang et al., arXiv 1907.12273, equations 1-3 with the
    permutations left out). Tokens of a group that lie outside the map do not exist: they are never attended.

    A bias of minus infinity forbids a key. A query without any key has output 0, lse minus infinity and no part in any
    gradient, as in torch's own scaled_dot_product_attention; this holds for every backend, dtype and derivative. No
    finite bias gives NaN.

    Args:
        q: [B, H, W, heads, K], any strides; fp16, bf16, fp32 or fp64. Of a line [B, L, heads, K], of a volume
            [B, D, H, W, heads, K]; all that follows likewise.
        k: [B, H, W, heads, K], dtype and device of q. It may have fewer heads, which divide those of q: each then
            serves as many neighbouring heads of queries (grouped-query attention, arXiv 2305.13245).
        v: [B, H, W, heads, V], dtype and device of q, heads of k; V may differ from K.
        partition: which pixels attend which, for maps of H x W. With a `PartitionBatch`, of maps of several sizes, q is
            [pixels, heads, K], k, v, valid and results likewise; all maps share a bias.
        bias: [heads, tokens, tokens], added to the scores, finite or minus infinity; tokens outside the map have their
            rows and columns too. One head serves all; [B, heads, tokens, tokens] is a bias for each map. Any floating
            dtype: an fp32 table under bf16 is read as it is.
        scale: factor of the scores; default K**-0.5. A tensor [heads] is one for each head, and may be learned (cosine
            attention).
        valid: [B, H, W], bool: which pixels exist (of images of several sizes in one batch). Others are never attended,
            whatever they hold, and have output 0, lse minus infinity and gradients 0.
        extra_k: [B, n, heads, K], keys that every pixel attends beside those of its group (class tokens, registers).
        extra_v: [B, n, heads, V], their values.
        extra_weight: [n] or [B or 1, H, W, n], at least 0: as so many copies of a key (default 1), for each query. With
            `missing_tokens` a padded map need not exist. Not differentiated.
        dropout_p: probability, from 0 and less than 1, that a weight is zeroed after the softmax; the others are
            divided by 1 - p. lse is that without. Which weights, `dropout_mask` says: by the seed and by where query
            and key stand, so all backends and derivatives have the same, and recomputation too, and nothing is stored.
        seed: of dropout, an int64 tensor of no dimensions on q's device, or an integer; drawn from PyTorch's generator
            of that device by default (`torch.manual_seed`).
        cosine: whether vectors of q, k and extra_k are divided by their lengths (or by 1e-12, if that is more), as
            `F.normalize` does: scores are cosines times `scale` (Swin V2, arXiv 2111.09883), whose default is K**-0.5
            still. The kernels do it on the way: nothing is written, and nothing more is kept for backward. Squares are
            summed in fp32 (fp64 for fp64), and must be finite there.
        backend: "triton" (the kernels), "eager" (PyTorch, any device and dtype) or "auto": the kernels for CUDA, ROCm
            and XPU tensors of the dtypes they take (fp16, bf16, fp32) where triton is installed, eager otherwise.

    Returns:
        [B, H, W, heads, V], contiguous, dtype of q. Differentiable with respect to q, k, v, bias, a scale that is a
        tensor, extra_k and extra_v, to any order.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: shapes or devices that do not fit together, a hand-made partition that has not every pixel in one
            group once, or an unknown backend.

    Examples:
        >>> q = k = v = torch.randn(1, 16, 24, 1, 32)
        >>> partitioned_attention(q, k, v, Partition.interlaced((16, 24), stride=(8, 8))).shape
        torch.Size([1, 16, 24, 1, 32])
    """
    options = bias, scale, valid, (extra_k, extra_v, extra_weight), dropout_p, seed, cosine, backend
    return _attention(q, k, v, partition, *options, with_lse=False)[0]


def partitioned_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partition: Partition | PartitionBatch,
    *,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    valid: Tensor | None = None,
    extra_k: Tensor | None = None,
    extra_v: Tensor | None = None,
    extra_weight: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | int | None = None,
    cosine: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As `partitioned_attention`, with the log-sum-exp of every pixel's scores.

    Args:
        q: [B, H, W, heads, K], any strides; fp16, bf16, fp32 or fp64.
        k: [B, H, W, heads, K], dtype and device of q.
        v: [B, H, W, heads, V], dtype and device of q.
        partition: which pixels attend which, for maps of H x W.
        bias: [heads, tokens, tokens] or [B, heads, tokens, tokens], added to the scores.
        scale: factor of the scores, a number or a tensor [heads]; default K**-0.5.
        valid: [B, H, W], which pixels exist.
        extra_k: [B, n, heads, K], keys that every pixel attends too.
        extra_v: [B, n, heads, V], their values.
        extra_weight: [n] or [B or 1, H, W, n], as how many copies they count.
        dropout_p: probability that a weight is zeroed; lse is that without dropout.
        seed: of dropout, an integer or an int64 tensor of no dimensions.
        cosine: whether scores are cosines, times the scale.
        backend: "triton", "eager" or "auto".

    Returns:
        out as above, and lse [B, H, W, heads], natural logarithm, fp32 (fp64 for fp64 inputs), differentiable too.
        Attention over two disjoint sets of keys merges by it, with the weights ``softmax([lse_1, lse_2])``; where a
        bias may forbid all keys of both, clamp the two at their dtype's lowest number first.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: shapes or devices that do not fit together, a hand-made partition that has not every pixel in one
            group once, or an unknown backend.

    Examples:
        >>> q = k = v = torch.randn(1, 16, 24, 1, 32)
        >>> partitioned_attention_with_lse(q, k, v, Partition.local((16, 24), window=(8, 8)))[1].shape
        torch.Size([1, 16, 24, 1])
    """
    options = bias, scale, valid, (extra_k, extra_v, extra_weight), dropout_p, seed, cosine, backend
    return _attention(q, k, v, partition, *options, with_lse=True)


def dropout_mask(
    partition: Partition, *, maps: int, heads: int, dropout_p: float, seed: Tensor | int, extra_keys: int = 0
) -> Tensor:
    """Which weights `partitioned_attention` keeps, of every pixel to the tokens of its group and to extra keys.

    Args:
        partition: of the map.
        maps: B.
        heads: of the queries.
        dropout_p: probability that a weight is zeroed.
        seed: as it was given there.
        extra_keys: n, of `extra_k`.

    Returns:
        [B, H, W, heads, tokens + n], bool, on the seed's device; False for tokens outside the map.

    Raises:
        TypeError: a probability or a seed of the wrong kind or dtype.
        ValueError: a probability outside of [0, 1).

    Examples:
        >>> partition = Partition.local((4, 6), window=(2, 3))
        >>> mask = dropout_mask(partition, maps=2, heads=1, dropout_p=0.5, seed=7)
        >>> mask.shape, mask.sum().item()
        (torch.Size([2, 4, 6, 1, 6]), 154)
    """
    check_partition(partition)
    p, device = _checked_probability(dropout_p), seed.device if isinstance(seed, Tensor) else torch.device("cpu")
    seeds, size = _as_seed(seed, device), partition.size

    def numbers(count: int) -> Tensor:
        return torch.arange(count, device=device)

    *place, inside = partition.coordinates(numbers(partition.groups)[:, None], numbers(partition.tokens))
    seat = partition.seat(*(numbers(n).view(-1, *[1] * (len(size) - i)) for i, n in enumerate(size, start=1)))[0]
    extra = (partition.pixels + numbers(extra_keys)).expand(partition.groups, -1)
    keys = torch.cat([flat_index(tuple(place), tuple(partition)), extra], -1)  # [groups, tokens + n]
    exists = torch.cat([inside, torch.ones_like(extra, dtype=torch.bool)], -1)
    group = seat.expand(size).flatten()
    start, step = (x[..., None] for x in rows_of(seeds, maps, heads, partition.pixels))  # [B, pixels, heads, 1]
    kept = factors(start, step, keys[group][:, None], p, torch.float32) > 0
    return (kept & exists[group][:, None]).unflatten(1, size)


def missing_tokens(partition: Partition, device: torch.device | str | None = None) -> Tensor:
    """How many tokens of every pixel's group lie outside the map, [H, W], int64: what zero padding would have added.

    Args:
        partition: of the map.
        device: of the result; default torch's own.

    Examples:
        >>> missing_tokens(Partition.local((3, 4), window=(2, 4)))[:, 0]
        tensor([0, 0, 4])
    """
    _check_partition(partition)
    inside = torch.ones((), dtype=torch.int64, device=device)
    for axis in partition:
        group, token = torch.arange(axis.groups, device=device)[:, None], torch.arange(axis.tokens, device=device)
        counts = along(group, token, axis)[1].sum(1)  # [groups]
        seats = Partition(axis).seat(torch.arange(axis.size, device=device))[0]
        inside = inside[..., None] * counts[seats]
    return partition.tokens - inside


Extra = tuple[Tensor | None, Tensor | None, Tensor | None]  # keys, values, weights


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partition: Partition | PartitionBatch,
    bias: Tensor | None,
    scale: float | Tensor | None,
    valid: Tensor | None,
    extra: Extra,
    dropout_p: float,
    seed: Tensor | int | None,
    cosine: bool,
    backend: str,
    with_lse: bool,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if isinstance(partition, PartitionBatch):
        _check_packed(q, k, v, valid, partition, bias, extra, dropout_p)
        valid = valid if valid is None else valid[None]
        rest = bias, scale, valid, extra, dropout_p, seed, cosine, backend, with_lse, partition.table
        out, lse = _attention(q[None], k[None], v[None], partition.line, *rest)
        return out[0], lse[0] if with_lse else lse
    drops = seed is not None or type(dropout_p) not in (float, int) or dropout_p != 0
    plain = valid is None and extra == (None, None, None) and not drops and table is None and cosine is False
    key = replays.key(q, k, v, bias, partition, scale, backend, with_lse) if plain else None
    if key is not None and (results := replays.again(key, q, k, v, bias)) is not None:
        return results
    check_backend(backend)
    _check_partition(partition)
    given = tensors = {"q": q, "k": k, "v": v} | _named(extra)
    _check_kinds(tensors, len(partition))
    kind = q.device.type
    casts = _tracing.has_autocast(kind) and torch.is_autocast_enabled(kind)
    if casts and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        tensors = {name: x if name == "extra_weight" else x.to(dtype) for name, x in tensors.items()}
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    _check_fit(tensors, partition if table is None else None)
    bias = _checked_bias(bias, q, partition)
    factor, scales = _checked_scale(scale, q)
    if valid is not None:
        _check_valid(valid, q)
    dropout_p, seeds = _checked_dropout(dropout_p, seed, q)
    if type(cosine) is not bool:
        raise TypeError(f"cosine must be True or False, got {cosine!r}")
    call = Call(factor, partition, with_lse or extra != (None, None, None), choose(backend, q), dropout_p, cosine)
    inputs = Inputs(q, k, v, bias, scales, valid, seeds, table)
    with torch.autocast(kind, enabled=False) if casts else nullcontext():  # no further: what is fp32 inside stays so
        results = ops.attention(inputs, call)
        if "extra_k" in tensors:
            return _with_extra(*results, inputs, call, tensors)
    if key is not None and all(tensors[name] is x for name, x in given.items()):  # nothing was cast
        replays.remember(key, q, k, v, bias, call)
    return results


def _with_extra(
    out: Tensor, lse: Tensor, inputs: Inputs, call: Call, tensors: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """out and lse of a softmax over more keys: of two sets, each exp(lse) is the other's weight."""
    q, _, _, _, scales, valid, seed, _ = inputs
    if valid is not None:  # whatever others hold
        q = q.masked_fill(~valid[..., None, None], 0)
    q, k = q.to(lse.dtype), tensors["extra_k"].to(lse.dtype)
    if call.cosine:
        q, k = normalised(q), normalised(k)
    s = call.scale * torch.einsum("b...hk,bnhk->b...hn", q, k)
    if scales is not None:
        s = s * scales[:, None]
    if (weight := tensors.get("extra_weight")) is not None:
        s = s + weight.detach().to(s.dtype).log().unsqueeze(-2)  # [B, H, W, heads, n]
    if valid is not None:
        s = s.masked_fill(~valid[..., None, None], -torch.inf)
    largest = torch.maximum(lse, s.amax(-1)).detach().clamp(min=torch.finfo(lse.dtype).min)
    ours, theirs = (lse - largest).exp(), (s - largest[..., None]).exp()
    total = ours + theirs.sum(-1)
    some = torch.where(total > 0, total, 1)  # a query without keys has parts of 0, any other one of 1
    if seed is not None:
        maps, *size, heads, n = theirs.shape
        start, step = (x.unflatten(1, size)[..., None] for x in rows_of(seed, maps, heads, prod(size)))
        keys = prod(size) + torch.arange(n, device=q.device)
        theirs = theirs * factors(start, step, keys, call.dropout_p, s.dtype)
    context = torch.einsum("b...hn,bnhv->b...hv", theirs, tensors["extra_v"].to(s.dtype))
    out = ((ours[..., None] * out + context) / some[..., None]).to(out.dtype)
    return out, torch.where(total > 0, largest + some.log(), -torch.inf)


def _check_partition(partition: Partition) -> None:
    """But in graphs, whose sizes may be symbols, or tensors; operators in them check when they run."""
    if not (torch.compiler.is_compiling() or _tracing.is_recorded() or _tracing.wants_torch_operators()):
        check_partition(partition)


_MAPS = ("L", "H, W", "D, H, W")  # of one, two and three axes


def _named(extra: Extra) -> dict[str, Tensor]:
    """Those that are given. Raises TypeError where there are keys without values, or none of them and weights."""
    k, v, weight = extra
    if (k is None) != (v is None) or (k is None and weight is not None):
        raise TypeError("extra_k and extra_v must be given together, and extra_weight with them or not at all")
    return {name: x for name, x in zip(("extra_k", "extra_v", "extra_weight"), extra, strict=True) if x is not None}


def _check_kinds(tensors: dict[str, Tensor], axes: int) -> None:
    for name, x in tensors.items():
        dims = "B, n, heads, width" if name in ("extra_k", "extra_v") else f"B, {_MAPS[axes - 1]}, heads, width"
        _check_tensor(name, x)
        if name != "extra_weight" and x.dim() != dims.count(",") + 1:
            raise ValueError(f"{name} must be [{dims}], got shape {tuple(x.shape)}")


def _check_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Any,
    batch: PartitionBatch,
    bias: Any,
    extra: Extra,
    dropout_p: Any,
) -> None:
    """What packed tensors are, and do not go with."""
    for name, x in {"q": q, "k": k, "v": v}.items():
        _check_tensor(name, x)
        if x.dim() != 3 or x.shape[0] != batch.pixels:
            raise ValueError(f"{name} must be [pixels, heads, width] with {batch.pixels} pixels, got {tuple(x.shape)}")
    table = batch.table
    if not isinstance(table, Tensor) or table.dtype != torch.int32 or table.dim() != 2 or not table.numel():
        raise TypeError(f"partition.table must be a torch.int32 [groups, tokens], got {type(table).__name__}")
    _check_device("partition.table", table, q)
    if valid is not None and (not isinstance(valid, Tensor) or tuple(valid.shape) != (batch.pixels,)):
        raise ValueError(f"valid must be [pixels] = {(batch.pixels,)} of a PartitionBatch, got {_shape_of(valid)}")
    if isinstance(bias, Tensor) and bias.dim() != 3:
        raise ValueError(
            f"bias must be [heads, tokens, tokens], for all maps of a PartitionBatch, got {_shape_of(bias)}"
        )
    if any(x is not None for x in extra):
        raise ValueError("extra_k, extra_v and extra_weight do not go with a PartitionBatch")
    if not isinstance(dropout_p, (int, float)) or dropout_p:
        raise ValueError(f"dropout_p must be 0 with a PartitionBatch, got {dropout_p!r}")


def _shape_of(x: Any) -> Any:
    return tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__


def _check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be one of {', '.join(map(str, _DTYPES))}, got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'nested' if x.is_nested else x.layout}")


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def _check_fit(tensors: dict[str, Tensor], partition: Partition | None) -> None:
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    for name, x in tensors.items():
        if x.dtype != q.dtype and name != "extra_weight":
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        _check_device(name, x, q)
    if q.shape[-1] < 1:
        raise ValueError(f"q must have a width of at least 1, got shape {tuple(q.shape)}")
    fits = k.shape[:-2] == q.shape[:-2] and k.shape[-1] == q.shape[-1]
    heads, fewer = q.shape[-2], k.shape[-2]
    if not fits or (fewer != heads and (fewer < 1 or heads % fewer)):
        raise ValueError(
            f"k must have the shape of q, {tuple(q.shape)}, or heads that divide its heads, got {tuple(k.shape)}"
        )
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v must be {[*k.shape[:-1], 'V']} as k is, got {tuple(v.shape)}")
    if partition is not None and (size := tuple(q.shape[1:-2])) != partition.size:
        raise ValueError(f"partition is for maps of {partition.size}, but q is {tuple(q.shape)}, a map of {size}")
    if "extra_k" in tensors:
        _check_extra(tensors, q, v)


def _check_extra(tensors: dict[str, Tensor], q: Tensor, v: Tensor) -> None:
    (B, *size, heads, K), n, V = q.shape, tensors["extra_k"].shape[1], v.shape[-1]
    for name, expected in (("extra_k", (B, n, heads, K)), ("extra_v", (B, n, heads, V))):
        if tuple(tensors[name].shape) != expected:
            raise ValueError(f"{name} must be [B, n, heads, width] = {expected}, got {tuple(tensors[name].shape)}")
    if n < 1:
        raise ValueError("extra_k must have at least one key, got none")
    weight = tensors.get("extra_weight")
    if weight is not None and tuple(weight.shape) not in ((n,), (B, *size, n), (1, *size, n)):
        raise ValueError(f"extra_weight must be [n] = {(n,)} or {(B, *size, n)}, got {tuple(weight.shape)}")


def _checked_bias(bias: Any, q: Tensor, partition: Partition) -> Tensor | None:
    """With all heads, of which one may serve for all."""
    if bias is None:
        return None
    _check_tensor("bias", bias)
    _check_device("bias", bias, q)
    heads, tokens = q.shape[-2], partition.tokens
    of_map = (q.shape[0],) if bias.dim() == 4 else ()
    if tuple(bias.shape) not in ((*of_map, heads, tokens, tokens), (*of_map, 1, tokens, tokens)):
        raise ValueError(
            f"bias must be [heads, tokens, tokens] = {(heads, tokens, tokens)}, or with the batch before it,"
            f" got {tuple(bias.shape)}"
        )
    return bias.expand(*of_map, heads, tokens, tokens)


def _checked_scale(scale: Any, q: Tensor) -> tuple[float, Tensor | None]:
    """The factor of all scores, and those of the heads."""
    if scale is None:
        return float(q.shape[-1] ** -0.5), None
    if isinstance(scale, Tensor):
        _check_tensor("scale", scale)
        _check_device("scale", scale, q)
        if tuple(scale.shape) != (q.shape[-2],):
            raise ValueError(f"scale must be a number or [heads] = {(q.shape[-2],)}, got shape {tuple(scale.shape)}")
        return 1.0, scale
    if not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, a tensor [heads] or None, got {scale!r}")
    if not -sys.float_info.max <= scale <= sys.float_info.max:  # nor an integer beyond it
        raise ValueError(f"scale must be finite, got {scale!r}")
    return float(scale), None


def _checked_dropout(dropout_p: Any, seed: Any, q: Tensor) -> tuple[float, Tensor | None]:
    """The probability, and the seed as backends take it; none without dropout."""
    probability = _checked_probability(dropout_p)
    if not probability:
        if seed is not None:
            raise ValueError("seed is that of dropout: give a dropout_p above 0 with it, or no seed")
        return 0.0, None
    if seed is None:
        return probability, torch.randint(_SEEDS - 1, (1,), dtype=torch.int64, device=q.device)
    if isinstance(seed, Tensor):
        _check_device("seed", seed, q)
    return probability, _as_seed(seed, q.device)


def _checked_probability(dropout_p: Any) -> float:
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"dropout_p must be a number, got {dropout_p!r}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {dropout_p!r}")
    return float(dropout_p)


def _as_seed(seed: Any, device: torch.device) -> Tensor:
    """A seed as an int64 tensor [1], without a look at a device's memory."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.dim():
            raise TypeError(f"seed must be a torch.int64 of no dimensions, got {seed.dtype} of {tuple(seed.shape)}")
        return seed.reshape(1)
    number = whole("seed", seed)
    if not -_SEEDS <= number < _SEEDS:
        raise ValueError(f"seed must have 64 bits with its sign, got {seed!r}")
    return torch.full((1,), number, dtype=torch.int64, device=device)


def _check_valid(valid: Any, q: Tensor) -> None:
    if not isinstance(valid, Tensor):
        raise TypeError(f"valid must be a torch.Tensor, got {type(valid).__name__}")
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must be torch.bool, got {valid.dtype}")
    _check_device("valid", valid, q)
    if tuple(valid.shape) != tuple(q.shape[:-2]):
        raise ValueError(f"valid must be {tuple(q.shape[:-2])} as the map of q is, got {tuple(valid.shape)}")
