"""Calls like earlier ones, made again: nothing is checked, chosen or planned twice.

A call that was made is known to be right. Another that differs in what its tensors hold only, and of which nobody sees
more than the result and gradients, is its launches again, in a fraction of the host's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _tracing, ops
from .backend import triton
from .backend.contract import Call, Inputs
from .partition import Partition

MOST = 4096  # calls that are known at a time
Key = tuple[Any, ...]  # whether a call is recorded, and all else that it depends on beside what its tensors hold
_KNOWN: dict[Key, triton.Replay] = {}
_SCALES = (float, int, type(None))


def key(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, partition: Partition, scale: Any, backend: Any, with_lse: bool
) -> Key | None:
    """The key of a call, or None if it has to be made as any other."""
    if type(partition) is not Partition or type(scale) not in _SCALES or type(backend) is not str:
        return None
    like = _likeness((q, k, v) if bias is None else (q, k, v, bias))
    if like is None:
        return None
    learned = q.requires_grad or k.requires_grad or v.requires_grad or (bias is not None and bias.requires_grad)
    recorded = learned and torch.is_grad_enabled()
    if recorded and with_lse:
        return None
    return recorded, like, partition, scale, backend, with_lse, _tracing.autocast(q)


def again(key: Key, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Any] | None:
    """The results of a call whose like was remembered; None where there was none, or another device is current."""
    try:
        known = _KNOWN.get(key)
    except TypeError:  # a partition of what nobody can hash: it is refused where all is checked
        return None
    if known is None or not known.launch.is_here():
        return None
    return (_Again.apply(known, q, k, v, bias), None) if key[0] else known(q, k, v, bias)


def remember(key: Key, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call) -> None:
    """Know a call from now on, if it can be repeated."""
    shared = q.shape[-2] != k.shape[-2]
    if call.backend == "triton" and not shared and triton.can_replay(q, k, v, bias) and key not in _KNOWN:
        if len(_KNOWN) >= MOST:
            _KNOWN.clear()
        with_lse = call.with_lse or (key[0] and triton.keeps_output(q, v, call.partition))
        _KNOWN[key] = triton.Replay(call._replace(with_lse=with_lse), q, k, v, bias)


def _likeness(tensors: Sequence[Tensor]) -> tuple[Any, ...] | None:
    """All that a computation on tensors depends on but what they hold; None if more than its result is seen of it."""
    if not _tracing.is_unwatched(tensors):
        return None
    try:
        of_tensors = [(x.shape, x.stride(), x.dtype, x.device, x.is_neg(), not x.data_ptr() % 16) for x in tensors]
    except RuntimeError:  # sparse, nested or otherwise without strides and memory
        return None
    first = tensors[0]
    return triton.precision_of(first.dtype, first.device) if first.dtype is torch.float32 else None, *of_tensors


def forget() -> None:
    """Forget all calls, and what was looked up and compiled for them: tiles or the driver have changed."""
    _KNOWN.clear()
    triton.forget()


class _Again(torch.autograd.Function):
    """known, q, k, v, bias -> out. Saved tensors may come back in other layouts, by a hook: backward looks again."""

    @staticmethod
    def forward(ctx: Any, known: triton.Replay, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        out, lse = known(q, k, v, bias)
        ctx.known = known
        ctx.save_for_backward(q, k, v, bias, None if lse is None else out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        known, tensors = ctx.known, (*ctx.saved_tensors, do)
        like = None if torch.is_grad_enabled() else _likeness([x for x in tensors if x is not None])
        if like is not None and (again := known.backward.get(like)) is not None and again.launch.is_here():
            return None, *again(*tensors)
        q, k, v, bias, out, lse, _ = tensors
        dq, dk, dv, dbias, _ = ops.gradients(Inputs(q, k, v, bias), out, lse, do, None, known.call)
        if like is not None and triton.can_replay(*tensors):
            known.backward[like] = triton.BackwardReplay(known.call, *tensors)
        return None, dq, dk, dv, None if tensors[3] is None else dbias
