"""What PyTorch sees: opaque operators, and autograd Functions that know every derivative.

`attention` is differentiable to any order, in reverse and forward mode, and accepts torch.func, torch.compile and
torch.export. First derivatives run the backend's own code; anything higher goes through `eager.plain`. Arguments were
checked by `functional`; shapes are those of `eager`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import eager, fused
from .partition import Axis, Partition

Tensors = tuple[Tensor, ...]
_BACKENDS: dict[str, Any] = {"eager": eager, "triton": fused}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    partition: Partition,
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """out and lse (meaningful if `with_lse`), differentiable with respect to q, k, v and bias.

    `backend` is "eager" or "triton".
    """
    return _call(_Attention, q, k, v, bias, scale, partition, with_lse, backend)


# -- operators: what a compiler keeps in its graph instead of the loop over chunks or the kernels ----------------------

_library = torch.library.Library("isa_triton", "DEF")
_library.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, SymInt[] h, SymInt[] w, bool with_lse,"
    " str backend) -> (Tensor, Tensor)"
)
_library.define(
    "backward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? out, Tensor? lse, Tensor do, Tensor? dlse,"
    " float scale, SymInt[] h, SymInt[] w, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _partition(h: Sequence[int], w: Sequence[int]) -> Partition:
    return Partition(Axis(*h), Axis(*w))


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def _forward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    h: list[int],
    w: list[int],
    with_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _BACKENDS[backend].forward(q, k, v, bias, scale, _partition(h, w), with_lse)


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def _backward_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    do: Tensor,
    dlse: Tensor | None,
    scale: float,
    h: list[int],
    w: list[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _BACKENDS[backend].backward(q, k, v, bias, out, lse, do, dlse, scale, _partition(h, w))


@torch.library.register_fake("isa_triton::forward", lib=_library)
def _fake_forward(q: Any, k: Any, v: Any, bias: Any, scale: Any, h: Any, w: Any, with_lse: bool, backend: str) -> Any:
    return eager.empty_outputs(q, v, with_lse)


@torch.library.register_fake("isa_triton::backward", lib=_library)
def _fake_backward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *_: Any) -> Tensors:
    return eager.empty_gradients(q, k, v, bias)


@register_flop_formula(torch.ops.isa_triton.forward)
def _forward_flops(q: Any, k: Any, v: Any, bias: Any, scale: Any, h: Any, w: Any, *_: Any, **__: Any) -> int:
    return _matmul_flops(q, h, w, widths=q[-1] + v[-1])


@register_flop_formula(torch.ops.isa_triton.backward)
def _backward_flops(
    q: Any,
    k: Any,
    v: Any,
    bias: Any,
    out: Any,
    lse: Any,
    do: Any,
    dlse: Any,
    scale: Any,
    h: Any,
    w: Any,
    *_: Any,
    **__: Any,
) -> int:
    return _matmul_flops(q, h, w, widths=3 * q[-1] + 2 * v[-1])  # the scores again, dP, dv, dq, dk


def _matmul_flops(q: Any, h: Any, w: Any, widths: int) -> int:
    return 2 * q[0] * q[3] * widths * _partition(h, w).pairs


def _opaque(backend: str, *tensors: Tensor | None) -> bool:
    """Whether a call has to be one operator: for compilers, and around kernels for whoever else looks at operators.

    Eager code is made of PyTorch's own operators, which modes may look into; kernels that nobody looks at save the
    dispatcher's time. Tensors without memory must not meet a kernel.
    """
    if torch.compiler.is_compiling():
        return True
    if backend != "triton":
        return False
    observed = torch._C._len_torch_dispatch_stack() > 0 or torch.autograd._profiler_enabled()
    return observed or any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta for x in tensors if x is not None)


# -- derivatives -------------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scale: float,
        partition: Partition,
        with_lse: bool,
        backend: str,
    ) -> Tensors:
        if _opaque(backend, q, k, v, bias):
            return torch.ops.isa_triton.forward.default(q, k, v, bias, scale, *map(list, partition), with_lse, backend)
        return _BACKENDS[backend].forward(q, k, v, bias, scale, partition, with_lse)

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scale: float,
        partition: Partition,
        with_lse: bool,
        backend: str,
    ) -> Tensors:
        with_lse = with_lse or _keeps_output(q, v, partition, backend)
        return _Attention.run(q, k, v, bias, scale, partition, with_lse, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        q, k, v, bias, ctx.scale, ctx.partition, ctx.with_lse, ctx.backend = inputs
        kept = output if _keeps_output(q, v, ctx.partition, ctx.backend) else (None, None)
        ctx.save_for_backward(q, k, v, bias, *kept)
        ctx.save_for_forward(q, k, v, bias)
        ctx.set_materialize_grads(False)
        if not ctx.with_lse:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        do = q.new_zeros(v.shape) if do is None else do
        dlse = dlse if ctx.with_lse else None  # a compiler passes zeros where autograd passes None
        inputs = q, k, v, bias, out, lse, do, dlse, ctx.scale, ctx.partition, ctx.backend
        dq, dk, dv, dbias = _call(_AttentionBackward, *inputs)
        return dq, dk, dv, None if bias is None else dbias, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any, *rest: Any) -> tuple[Any, Any]:
        n, with_lse = info.batch_size, rest[2]
        folded = (_fold(x, dim, n, at) for x, dim, at in zip((q, k, v, bias), in_dims, (3, 3, 3, 0), strict=False))
        out, lse = _call(_Attention, *folded, *rest)
        return (_unfold(out, n, heads=3), _unfold(lse, n, heads=3) if with_lse else lse), (3, 3 if with_lse else None)


class _AttentionBackward(torch.autograd.Function):
    @staticmethod
    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        out: Tensor | None,
        lse: Tensor | None,
        do: Tensor,
        dlse: Tensor | None,
        scale: float,
        partition: Partition,
        backend: str,
    ) -> Tensors:
        if _opaque(backend, q, k, v, bias, do, dlse):
            return torch.ops.isa_triton.backward.default(
                q, k, v, bias, out, lse, do, dlse, scale, *map(list, partition), backend
            )
        return _BACKENDS[backend].backward(q, k, v, bias, out, lse, do, dlse, scale, partition)

    forward = run

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        q, k, v, bias, _, _, do, dlse, ctx.scale, ctx.partition, _ = inputs
        ctx.save_for_backward(q, k, v, bias, do, dlse)
        ctx.save_for_forward(q, k, v, bias, do, dlse)

    @staticmethod
    def _plain(ctx: Any) -> Callable[..., Tensors]:
        """The gradients as a function of q, k, v, bias, do and dlse; out and lse are functions of those."""

        def gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, do: Tensor, dlse: Tensor | None) -> Tensors:
            def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensors:
                out, lse = eager.plain(q, k, v, bias, ctx.scale, ctx.partition)
                return (out,) if dlse is None else (out, lse)

            dq, dk, dv, dbias = _pull_back(f, (q, k, v, bias), (do,) if dlse is None else (do, dlse))
            return dq, dk, dv, q.new_empty(0) if dbias is None else dbias

        return gradients

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        dq, dk, dv, dbias, ddo, ddlse = _pull_back(_AttentionBackward._plain(ctx), ctx.saved_tensors, cotangents)
        return dq, dk, dv, dbias, None, None, ddo, ddlse, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        n, bias = info.batch_size, inputs[3]
        heads = (3, 3, 3, 0, 3, 3, 3, 3)
        folded = (_fold(x, dim, n, at) for x, dim, at in zip(inputs, in_dims, heads, strict=False))
        *gradients, dbias = _call(_AttentionBackward, *folded, *inputs[len(heads) :])
        outputs = [_unfold(x, n, heads=3) for x in gradients] + [dbias if bias is None else _unfold(dbias, n, heads=0)]
        return tuple(outputs), (3, 3, 3, None if bias is None else 0)


def _keeps_output(q: Tensor, v: Tensor, partition: Partition, backend: str) -> bool:
    return backend == "triton" and fused.keeps_output(q, v, partition)


class _AttentionForwardMode(_Attention):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor | None]:
        def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensors:
            return eager.plain(q, k, v, bias, ctx.scale, ctx.partition)

        out, lse = _push_forward(f, ctx.saved_tensors[:4], tangents[:4])
        return out, lse if ctx.with_lse else None


class _AttentionBackwardForwardMode(_AttentionBackward):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensors:
        tangents = (*tangents[:4], *tangents[6:8])  # all but those of out and lse
        return _push_forward(_AttentionBackward._plain(ctx), ctx.saved_tensors, tangents)


_FORWARD_MODE: dict[Any, Any] = {_Attention: _AttentionForwardMode, _AttentionBackward: _AttentionBackwardForwardMode}
for _function in _FORWARD_MODE.values():
    _function.forward.__signature__ = inspect.signature(_function.forward)  # autograd asks for it in every call


def _call(function: Any, *inputs: Any) -> Any:
    """Apply a Function where somebody may differentiate; else only run it, in a fraction of the host's time."""
    if torch.compiler.is_compiling():  # Dynamo refuses every Function with a jvp
        return function.apply(*inputs)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if recorded or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _FORWARD_MODE[function].apply(*inputs)
    return function.run(*inputs)


def _setup_operator(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    *arguments, h, w, with_lse, backend = inputs
    _Attention.setup_context(ctx, (*arguments, _partition(h, w), with_lse, backend), output)


def _differentiate_operator(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    return *_Attention.backward(ctx, *gradients), None  # two axes where the Function has one partition


# An exported graph holds the operator without the Function around it, and must train all the same.
torch.library.register_autograd(
    "isa_triton::forward", _differentiate_operator, setup_context=_setup_operator, lib=_library
)


def _fold(x: Tensor | None, dim: int | None, n: int, heads: int) -> Tensor | None:
    """A vmapped dimension becomes more heads: all that attention does is independent for every head."""
    if x is None:
        return None
    x = x.movedim(dim, heads) if dim is not None else x.unsqueeze(heads).expand(*x.shape[:heads], n, *x.shape[heads:])
    return x.flatten(heads, heads + 1)


def _unfold(x: Tensor, n: int, heads: int) -> Tensor:
    return x.unflatten(heads, (n, -1))


def _pull_back(f: Callable[..., Tensors], inputs: Sequence[Tensor | None], cotangents: Tensors) -> tuple[Any, ...]:
    """The vector-Jacobian product of f at `inputs`, itself differentiable; None for inputs that are None."""
    present = [i for i, x in enumerate(inputs) if x is not None]
    vjp: Any = torch.func.vjp  # annotated as if has_aux were always set
    _, pull = vjp(_with_nones(f, len(inputs), present), *(inputs[i] for i in present))
    gradients = dict(zip(present, pull(cotangents), strict=True))
    return tuple(gradients.get(i) for i in range(len(inputs)))


def _push_forward(f: Callable[..., Tensors], inputs: Sequence[Tensor | None], tangents: Sequence[Any]) -> Tensors:
    """The Jacobian-vector product of f: the pull-back is linear in its cotangents, and this is its transpose."""
    present = [i for i, x in enumerate(inputs) if x is not None]
    primals: list[Any] = [inputs[i] for i in present]
    vjp: Any = torch.func.vjp
    outputs, pull = vjp(_with_nones(f, len(inputs), present), *primals)
    _, push = vjp(pull, tuple(torch.zeros_like(x) for x in outputs))
    pairs = zip((tangents[i] for i in present), primals, strict=True)
    return push(tuple(torch.zeros_like(x) if t is None else t for t, x in pairs))[0]


def _with_nones(f: Callable[..., Tensors], arity: int, present: list[int]) -> Callable[..., Tensors]:
    def g(*tensors: Tensor) -> Tensors:
        given = dict(zip(present, tensors, strict=True))
        return f(*(given.get(i) for i in range(arity)))

    return g
