"""What PyTorch sees: opaque operators, and autograd Functions that know every derivative.

`attention` is differentiable to any order, in reverse and forward mode, and accepts torch.func, torch.compile and
torch.export. First derivatives run the backend's own code; anything higher goes through `backend.plain`. Shapes are
those of `backend.contract`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import _tracing
from .backend import BY_NAME, plain
from .backend.contract import Call, empty_gradients, empty_outputs

Tensors = tuple[Tensor, ...]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """out and lse (meaningful if `call.with_lse`), differentiable with respect to q, k, v and bias."""
    if _tracing.wants_torch_operators():
        return plain.attention(q, k, v, bias, call.scale, call.partition)
    return _apply(_Attention, q, k, v, bias, call)


def gradients(*tensors_and_call: Any) -> Tensors:
    """dq, dk, dv and dbias, differentiable in their turn; takes and returns what `Backend.backward` does."""
    return _apply(_AttentionBackward, *tensors_and_call)


# -- operators: what a compiler keeps in its graph instead of the loop over chunks or the kernels ----------------------

_library = torch.library.Library("isa_triton", "DEF")
_library.define(
    "forward(Tensor q, Tensor k, Tensor v, Tensor? bias, float scale, SymInt[] axes, bool with_lse,"
    " str backend) -> (Tensor, Tensor)"
)
_library.define(
    "backward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? out, Tensor? lse, Tensor do, Tensor? dlse,"
    " float scale, SymInt[] axes, bool with_lse, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def _forward_operator(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *call: Any) -> Tensors:
    return _run_forward(q, k, v, bias, Call.unflatten(*call).checked(q))


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def _backward_operator(*tensors_and_call: Any) -> Tensors:
    *tensors, scale, axes, with_lse, backend = tensors_and_call
    return _run_backward(*tensors, Call.unflatten(scale, axes, with_lse, backend).checked(tensors[0]))


@torch.library.register_fake("isa_triton::forward", lib=_library)
def _fake_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *call: Any) -> Tensors:
    return empty_outputs(q, v, Call.unflatten(*call).with_lse)


@torch.library.register_fake("isa_triton::backward", lib=_library)
def _fake_backward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *_: Any) -> Tensors:
    return empty_gradients(q, k, v, bias)


def _forward_flops(q: Any, k: Any, v: Any, bias: Any, *call: Any, **_: Any) -> int:
    return _matmul_flops(q, Call.unflatten(*call), widths=q[-1] + v[-1])


def _backward_flops(q: Any, k: Any, v: Any, *rest: Any, **_: Any) -> int:
    widths = 3 * q[-1] + 2 * v[-1]  # the scores again, dP, dv, dq, dk
    return _matmul_flops(q, Call.unflatten(*rest[-4:]), widths)


def _matmul_flops(q: Any, call: Call, widths: int) -> int:
    return 2 * q[0] * q[-2] * widths * call.partition.pairs


def _register_flop_formulas(flop_counter: ModuleType) -> None:
    flop_counter.register_flop_formula(torch.ops.isa_triton.forward)(_forward_flops)
    flop_counter.register_flop_formula(torch.ops.isa_triton.backward)(_backward_flops)


_tracing.when_imported("torch.utils.flop_counter", _register_flop_formulas)  # which imports Triton


def _is_operator(call: Call, *tensors: Tensor | None) -> bool:
    """Whether a call has to be one operator: for compilers, and where others look and the backend's inside is opaque.

    Kernels that nobody looks at save the dispatcher's time; none may be launched for tensors without memory.
    """
    if torch.compiler.is_compiling() or _tracing.is_recorded():
        return True
    return BY_NAME[call.backend].OPAQUE and _tracing.wants_operators([x for x in tensors if x is not None])


def _run_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call) -> Tensors:
    return BY_NAME[call.backend].forward(q, k, v, bias, call)


def _run_backward(*tensors_and_call: Any) -> Tensors:
    return BY_NAME[tensors_and_call[-1].backend].backward(*tensors_and_call)


# -- derivatives -------------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """q, k, v, bias, call -> out, lse."""

    @staticmethod
    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call) -> Tensors:
        if _is_operator(call, q, k, v, bias):
            return torch.ops.isa_triton.forward.default(q, k, v, bias, *call.flat())
        return _run_forward(q, k, v, bias, call)

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, call: Call) -> Tensors:
        with_lse = call.with_lse or _keeps_output(q, v, call)
        return _Attention.run(q, k, v, bias, call._replace(with_lse=with_lse))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        q, k, v, bias, ctx.call = inputs
        keeps = _keeps_output(q, v, ctx.call)
        # A compiler keeps out for what comes after it anyway; told so, it does not keep a view instead, whose strides
        # of any size inductor (torch 2.14) cannot compare.
        out = output[0] if keeps or torch.compiler.is_compiling() else None
        ctx.save_for_backward(q, k, v, bias, out, output[1] if keeps else None)
        ctx.save_for_forward(q, k, v, bias)
        ctx.set_materialize_grads(False)
        if not ctx.call.with_lse:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        q, k, v, bias, out, lse = ctx.saved_tensors
        do = q.new_zeros(v.shape) if do is None else do
        dlse = dlse if ctx.call.with_lse else None  # a compiler passes zeros where autograd passes None
        dq, dk, dv, dbias = gradients(q, k, v, bias, out, lse, do, dlse, ctx.call)
        return dq, dk, dv, None if bias is None else dbias, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any, call: Call) -> tuple[Any, Any]:
        n, at = info.batch_size, 1 + len(call.partition)  # of the heads
        places = at, at, at, 0
        folded = (_fold(x, dim, n, heads) for x, dim, heads in zip((q, k, v, bias), in_dims, places, strict=False))
        out, lse = _apply(_Attention, *folded, call)
        results = _unfold(out, n, at), _unfold(lse, n, at) if call.with_lse else lse
        return results, (at, at if call.with_lse else None)


class _AttentionBackward(torch.autograd.Function):
    """q, k, v, bias, out, lse, do, dlse, call -> dq, dk, dv, dbias."""

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
        call: Call,
    ) -> Tensors:
        if _is_operator(call, q, k, v, bias, do, dlse):
            return torch.ops.isa_triton.backward.default(q, k, v, bias, out, lse, do, dlse, *call.flat())
        return _run_backward(q, k, v, bias, out, lse, do, dlse, call)

    forward = run

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        q, k, v, bias, _, _, do, dlse, ctx.call = inputs
        ctx.save_for_backward(q, k, v, bias, do, dlse)
        ctx.save_for_forward(q, k, v, bias, do, dlse)

    @staticmethod
    def _plain(call: Call) -> Callable[..., Tensors]:
        """The gradients as a function of q, k, v, bias, do and dlse; out and lse are functions of those."""

        def gradients(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, do: Tensor, dlse: Tensor | None) -> Tensors:
            def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensors:
                out, lse = plain.attention(q, k, v, bias, call.scale, call.partition)
                return (out,) if dlse is None else (out, lse)

            dq, dk, dv, dbias = _pull_back(f, (q, k, v, bias), (do,) if dlse is None else (do, dlse))
            return dq, dk, dv, q.new_empty(0) if dbias is None else dbias

        return gradients

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        dq, dk, dv, dbias, ddo, ddlse = _pull_back(_AttentionBackward._plain(ctx.call), ctx.saved_tensors, cotangents)
        return dq, dk, dv, dbias, None, None, ddo, ddlse, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        n, (*tensors, call) = info.batch_size, inputs
        has_bias, at = tensors[3] is not None, 1 + len(call.partition)  # of the heads
        places = at, at, at, 0, at, at, at, at
        folded = (_fold(x, dim, n, heads) for x, dim, heads in zip(tensors, in_dims, places, strict=False))
        *gradients, dbias = _apply(_AttentionBackward, *folded, call)
        outputs = [_unfold(x, n, at) for x in gradients] + [_unfold(dbias, n, heads=0) if has_bias else dbias]
        return tuple(outputs), (at, at, at, 0 if has_bias else None)


def _keeps_output(q: Tensor, v: Tensor, call: Call) -> bool:
    return BY_NAME[call.backend].keeps_output(q, v, call.partition)


class _AttentionForwardMode(_Attention):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor | None]:
        def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensors:
            return plain.attention(q, k, v, bias, ctx.call.scale, ctx.call.partition)

        out, lse = _push_forward(f, ctx.saved_tensors[:4], tangents[:4])
        return out, lse if ctx.call.with_lse else None


class _AttentionBackwardForwardMode(_AttentionBackward):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensors:
        tangents = (*tangents[:4], *tangents[6:8])  # all but those of out and lse
        return _push_forward(_AttentionBackward._plain(ctx.call), ctx.saved_tensors, tangents)


_FORWARD_MODE: dict[Any, Any] = {_Attention: _AttentionForwardMode, _AttentionBackward: _AttentionBackwardForwardMode}
for _function in _FORWARD_MODE.values():
    _function.forward.__signature__ = inspect.signature(_function.forward)  # autograd asks for it in every call


def _apply(function: Any, *inputs: Any) -> Any:
    """Apply a Function where somebody may differentiate; else only run it, in a fraction of the host's time."""
    if torch.compiler.is_exporting():  # programs hold operators, which know their derivatives, and no Functions
        return function.forward(*inputs)
    if torch.compiler.is_compiling():  # Dynamo refuses every Function with a jvp
        return function.apply(*inputs)
    if _tracing.is_differentiated([x for x in inputs if isinstance(x, Tensor)]):
        return _FORWARD_MODE[function].apply(*inputs)
    return function.run(*inputs)


def _setup_operator(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    q, k, v, bias, *call = inputs
    _Attention.setup_context(ctx, (q, k, v, bias, Call.unflatten(*call)), output)


def _differentiate_operator(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    *of_tensors, _ = _Attention.backward(ctx, *gradients)
    return *of_tensors, None, None, None, None  # what a call is made of has none


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
