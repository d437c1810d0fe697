"""Attention over a partition, as users call it: the arguments are checked and a backend is chosen."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from . import _tracing, ops, replays
from .backend import check_backend, choose
from .backend.contract import Call
from .partition import Partition, check_partition

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def partitioned_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partition: Partition,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention among the tokens of every group of a feature map, without moving a pixel.

    ``out = softmax(scale * q k^T + bias) v`` inside each group (Huang et al., arXiv 1907.12273, equations 1-3 with the
    permutations left out). Tokens of a group that lie outside the map do not exist: they are never attended.

    A bias of minus infinity forbids a key. A query without any key has output 0, lse minus infinity and no part in any
    gradient, as in torch's own scaled_dot_product_attention; this holds for every backend, dtype and derivative. No
    finite bias gives NaN.

    Args:
        q: [B, H, W, heads, K], any strides; fp16, bf16, fp32 or fp64.
        k: [B, H, W, heads, K], dtype and device of q.
        v: [B, H, W, heads, V], dtype and device of q; V may differ from K.
        partition: which pixels attend which, for maps of H x W.
        bias: [heads, tokens, tokens], added to the scores, finite or minus infinity; tokens outside the map have their
            rows and columns too.
        scale: factor of the scores; default K**-0.5.
        backend: "triton" (the kernels), "eager" (PyTorch, any device and dtype) or "auto": the kernels for CUDA, ROCm
            and XPU tensors of the dtypes they take (fp16, bf16, fp32) where triton is installed, eager otherwise.

    Returns:
        [B, H, W, heads, V], contiguous, dtype of q. Differentiable with respect to q, k, v and bias, to any order.

    Raises:
        TypeError: an argument of the wrong kind or dtype.
        ValueError: shapes or devices that do not fit together, a hand-made partition that has not every pixel in one
            group once, or an unknown backend.

    Examples:
        >>> q = k = v = torch.randn(1, 16, 24, 1, 32)
        >>> partitioned_attention(q, k, v, Partition.interlaced((16, 24), stride=(8, 8))).shape
        torch.Size([1, 16, 24, 1, 32])
    """
    return _attention(q, k, v, partition, bias, scale, backend, with_lse=False)[0]


def partitioned_attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partition: Partition,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As `partitioned_attention`, with the log-sum-exp of every pixel's scores.

    Args:
        q: [B, H, W, heads, K], any strides; fp16, bf16, fp32 or fp64.
        k: [B, H, W, heads, K], dtype and device of q.
        v: [B, H, W, heads, V], dtype and device of q.
        partition: which pixels attend which, for maps of H x W.
        bias: [heads, tokens, tokens], added to the scores.
        scale: factor of the scores; default K**-0.5.
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
    return _attention(q, k, v, partition, bias, scale, backend, with_lse=True)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    partition: Partition,
    bias: Tensor | None,
    scale: float | None,
    backend: str,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    key = replays.key(q, k, v, bias, partition, scale, backend, with_lse)
    if key is not None and (results := replays.again(key, q, k, v, bias)) is not None:
        return results
    check_backend(backend)
    if not (torch.compiler.is_compiling() or _tracing.is_recorded() or _tracing.wants_torch_operators()):
        # whose sizes may be symbols, or tensors; operators in their graphs check when they run
        check_partition(partition)
    given = tensors = {"q": q, "k": k, "v": v} | ({} if bias is None else {"bias": bias})
    _check_kinds(tensors, len(partition))
    kind = q.device.type
    if _tracing.has_autocast(kind) and torch.is_autocast_enabled(kind) and q.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
        tensors = {name: x.to(dtype) for name, x in tensors.items()}
    _check_fit(tensors, partition)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    elif not -sys.float_info.max <= scale <= sys.float_info.max:  # nor an integer beyond it
        raise ValueError(f"scale must be finite, got {scale!r}")
    q, k, v, bias = tensors["q"], tensors["k"], tensors["v"], tensors.get("bias")
    call = Call(float(scale), partition, with_lse, choose(backend, q))
    results = ops.attention(q, k, v, bias, call)
    if key is not None and all(tensors[name] is x for name, x in given.items()):  # nothing was cast
        replays.remember(key, q, k, v, bias, call)
    return results


_MAPS = ("L", "H, W", "D, H, W")  # of one, two and three axes


def _check_kinds(tensors: dict[str, Tensor], axes: int) -> None:
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be one of {', '.join(map(str, _DTYPES))}, got {x.dtype}")
        if x.layout != torch.strided or x.is_nested:
            raise TypeError(f"{name} must be a dense tensor, got {'nested' if x.is_nested else x.layout}")
        dims = "heads, tokens, tokens" if name == "bias" else f"B, {_MAPS[axes - 1]}, heads, width"
        if x.dim() != dims.count(",") + 1:
            raise ValueError(f"{name} must be [{dims}], got shape {tuple(x.shape)}")


def _check_fit(tensors: dict[str, Tensor], partition: Partition) -> None:
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    for name, x in tensors.items():
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
    if q.shape[-1] < 1:
        raise ValueError(f"q must have a width of at least 1, got shape {tuple(q.shape)}")
    if k.shape != q.shape:
        raise ValueError(f"k must have the shape of q, {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:-1] != q.shape[:-1]:
        raise ValueError(f"v must be {[*q.shape[:-1], 'V']} as q is, got {tuple(v.shape)}")
    if (size := tuple(q.shape[1:-2])) != partition.size:
        raise ValueError(f"partition is for maps of {partition.size}, but q is {tuple(q.shape)}, a map of {size}")
    if "bias" in tensors:
        expected = (q.shape[-2], partition.tokens, partition.tokens)
        if tuple(tensors["bias"].shape) != expected:
            raise ValueError(f"bias must be [heads, tokens, tokens] = {expected}, got {tuple(tensors['bias'].shape)}")
