"""Calls like earlier ones, made again: nothing is checked, chosen or planned twice.

A call that was made is known to be right. Another that differs in what its tensors hold only, and of which nobody sees
more than the result and gradients, is its launches again, in a fraction of the host's time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _tracing, ops
from .backend import triton
from .backend.contract import Call
from .partition import Partition

MOST = 4096  # calls that are known at a time


class Key(NamedTuple):
    """All that a call depends on beside what its tensors hold."""

    tensors: tuple[Any, ...]  # shape, stride, dtype, device and alignment of each
    partition: Partition
    scale: Any
    backend: str
    with_lse: bool
    recorded: bool  # for gradients
    autocast: torch.dtype | None
    precision: str | None  # of products of fp32


_KNOWN: dict[Key, triton.Replay] = {}
_SCALES = (float, int, type(None))


def key(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, partition: Partition, scale: Any, backend: Any, with_lse: bool
) -> Key | None:
    """The key of a call, or None if it has to be made as any other."""
    tensors = (q, k, v) if bias is None else (q, k, v, bias)
    if type(partition) is not Partition or type(scale) not in _SCALES or type(backend) is not str:
        return None
    if not _tracing.is_unwatched(tensors):
        return None
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if recorded and with_lse:
        return None
    kind = q.device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    precision = triton.precision_of(q.dtype, q.device) if q.dtype == torch.float32 else None
    of_tensors = tuple([(x.shape, x.stride(), x.dtype, x.device, not x.data_ptr() % 16) for x in tensors])
    return Key(of_tensors, partition, scale, backend, with_lse, recorded, autocast, precision)


def again(key: Key, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Any] | None:
    """The results of a call whose like was remembered; None where there was none, or another device is current."""
    known = _KNOWN.get(key)
    if known is None or not known.is_here():
        return None
    return (_Again.apply(known, q, k, v, bias), None) if key.recorded else known.forward(q, k, v, bias)


def remember(key: Key, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call) -> None:
    """Know a call from now on, if it can be repeated."""
    if call.backend == "triton" and triton.can_replay(q):
        if len(_KNOWN) >= MOST:
            _KNOWN.clear()
        with_lse = call.with_lse or (key.recorded and triton.keeps_output(q, v, call.partition))
        _KNOWN[key] = triton.Replay(q, k, v, bias, call._replace(with_lse=with_lse))


def forget() -> None:
    """Forget all calls, and what was looked up and compiled for them: tiles or the driver have changed."""
    _KNOWN.clear()
    triton.forget()


class _Again(torch.autograd.Function):
    """known, q, k, v, bias -> out."""

    @staticmethod
    def forward(ctx: Any, known: triton.Replay, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out, lse = known.forward(q, k, v, bias)
        ctx.known = known
        ctx.save_for_backward(q, k, v, bias, None if lse is None else out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        tensors, known = ctx.saved_tensors, ctx.known
        q, k, v, bias, out, lse = tensors
        if not torch.is_grad_enabled() and _tracing.is_unwatched((q, k, v, do)) and known.is_here():
            return None, *known.backward(*tensors, do)
        dq, dk, dv, dbias = ops.gradients(q, k, v, bias, out, lse, do, None, known.call)
        return None, dq, dk, dv, None if bias is None else dbias
