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
from .backend import BY_NAME, eager, plain
from .backend.contract import Call, Gradients, Inputs, empty_gradients, empty_outputs

Tensors = tuple[Tensor, ...]
DIFFERENTIABLE = 5  # of `Inputs`: all but valid, seed and table
NONE: tuple[None, ...] = (None,) * (len(Inputs._fields) - DIFFERENTIABLE)  # the gradients of the others


def attention(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """out and lse (meaningful if `call.with_lse`), differentiable with respect to all inputs but valid and seed."""
    if _tracing.wants_torch_operators():
        return _plain_attention(inputs, call)
    return _apply(_Attention, *inputs, call)


def gradients(
    inputs: Inputs, out: Tensor | None, lse: Tensor | None, do: Tensor, dlse: Tensor | None, call: Call
) -> Gradients:
    """What `Backend.backward` returns, differentiable in its turn."""
    return Gradients(*_apply(_AttentionBackward, *inputs, out, lse, do, dlse, call))


def _plain_attention(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    return plain.attention(inputs, call.scale, call.partition, call.dropout_p, call.cosine)


# -- operators: what a compiler keeps in its graph instead of the loop over chunks or the kernels ----------------------

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? scales, Tensor? valid, Tensor? seed, Tensor? table"
_CALL = "float scale, SymInt[] axes, bool with_lse, str backend, float dropout_p=0.0, bool cosine=False"
_BESIDE = 4  # tensors that backward takes beside the inputs
_library = torch.library.Library("isa_triton", "DEF")
_library.define(f"forward({_INPUTS}, {_CALL}) -> (Tensor, Tensor)")
_library.define(
    f"backward({_INPUTS}, Tensor? out, Tensor? lse, Tensor do, Tensor? dlse, {_CALL})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "forward", "CompositeExplicitAutograd")
def _forward_operator(*tensors_and_call: Any) -> Tensors:
    inputs, _others, call = _taken(tensors_and_call)
    return _run_forward(inputs, call.checked(inputs.q, inputs.table))


@torch.library.impl(_library, "backward", "CompositeExplicitAutograd")
def _backward_operator(*tensors_and_call: Any) -> Tensors:
    inputs, (out, lse, do, dlse), call = _taken(tensors_and_call, _BESIDE)
    return _run_backward(inputs, out, lse, do, dlse, call.checked(inputs.q, inputs.table))


@torch.library.register_fake("isa_triton::forward", lib=_library)
def _fake_forward(*tensors_and_call: Any) -> Tensors:
    inputs, _others, call = _taken(tensors_and_call)
    return empty_outputs(inputs, call.with_lse)


@torch.library.register_fake("isa_triton::backward", lib=_library)
def _fake_backward(*tensors_and_call: Any) -> Tensors:
    return empty_gradients(_taken(tensors_and_call, _BESIDE)[0])


def _taken(tensors_and_call: Sequence[Any], beside: int = 0) -> tuple[Inputs, Sequence[Any], Call]:
    """What an operator was given: the inputs, so many tensors beside them, the call, whose defaults are left out."""
    n = len(Inputs._fields)
    inputs, call = Inputs(*tensors_and_call[:n]), Call.unflatten(*tensors_and_call[n + beside :])
    return inputs, tensors_and_call[n : n + beside], call


def _forward_flops(*shapes_and_call: Any, **_: Any) -> int:
    inputs, _others, call = _taken(shapes_and_call)
    return _matmul_flops(inputs, call, of_keys=1, of_values=1)


def _backward_flops(*shapes_and_call: Any, **_: Any) -> int:
    inputs, _others, call = _taken(shapes_and_call, _BESIDE)
    return _matmul_flops(inputs, call, of_keys=3, of_values=2)  # the scores again, dq, dk; dP, dv


def _matmul_flops(inputs: Any, call: Call, of_keys: int, of_values: int) -> int:
    q, _, v, *_ = inputs  # their shapes
    widths = of_keys * q[-1] + of_values * v[-1]
    return 2 * q[0] * q[-2] * widths * call.partition.pairs


def _register_flop_formulas(flop_counter: ModuleType) -> None:
    flop_counter.register_flop_formula(torch.ops.isa_triton.forward)(_forward_flops)
    flop_counter.register_flop_formula(torch.ops.isa_triton.backward)(_backward_flops)
    eager.register_flop_formulas(flop_counter)


_tracing.when_imported("torch.utils.flop_counter", _register_flop_formulas)  # which imports Triton


def _is_operator(call: Call, *tensors: Tensor | None) -> bool:
    """Whether a call has to be one operator: for compilers, and where others look and the backend's inside is opaque.

    Kernels that nobody looks at save the dispatcher's time; none may be launched for tensors without memory.
    """
    if torch.compiler.is_compiling() or _tracing.is_recorded():
        return True
    return BY_NAME[call.backend].OPAQUE and _tracing.wants_operators([x for x in tensors if x is not None])


def _run_forward(inputs: Inputs, call: Call) -> Tensors:
    return BY_NAME[call.backend].forward(inputs, call)


def _run_backward(inputs: Inputs, out: Any, lse: Any, do: Tensor, dlse: Any, call: Call) -> Tensors:
    return BY_NAME[call.backend].backward(inputs, out, lse, do, dlse, call)


# -- derivatives -------------------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    """inputs, call -> out, lse."""

    @staticmethod
    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scales: Tensor | None,
        valid: Tensor | None,
        seed: Tensor | None,
        table: Tensor | None,
        call: Call,
    ) -> Tensors:
        inputs = Inputs(q, k, v, bias, scales, valid, seed, table)
        if _is_operator(call, *inputs):
            return torch.ops.isa_triton.forward.default(*inputs, *call.flat())
        return _run_forward(inputs, call)

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scales: Tensor | None,
        valid: Tensor | None,
        seed: Tensor | None,
        table: Tensor | None,
        call: Call,
    ) -> Tensors:
        with_lse = call.with_lse or _keeps_output(q, v, call)
        return _Attention.run(q, k, v, bias, scales, valid, seed, table, call._replace(with_lse=with_lse))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        *tensors, ctx.call = inputs
        q, _, v, *_ = tensors
        keeps = _keeps_output(q, v, ctx.call)
        # A compiler keeps out for what comes after it anyway; told so, it does not keep a view instead, whose strides
        # of any size inductor (torch 2.14) cannot compare.
        out = output[0] if keeps or torch.compiler.is_compiling() else None
        ctx.save_for_backward(*tensors, out, output[1] if keeps else None)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)
        if not ctx.call.with_lse:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        inputs = Inputs(*tensors)
        do = inputs.q.new_zeros(inputs.value_shape) if do is None else do
        dlse = dlse if ctx.call.with_lse else None  # a compiler passes zeros where autograd passes None
        found = gradients(inputs, out, lse, do, dlse, ctx.call)
        given = (None if x is None else gradient for x, gradient in zip(inputs, found, strict=False))
        return *given, *NONE, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        n, (*tensors, call) = info.batch_size, inputs
        at = 1 + len(call.partition)  # of the heads
        folded = _folded_inputs(tensors, in_dims, n, at)
        out, lse = _apply(_Attention, *folded, call)
        results = _unfold(out, n, at), _unfold(lse, n, at) if call.with_lse else lse
        return results, (at, at if call.with_lse else None)


class _AttentionBackward(torch.autograd.Function):
    """inputs, out, lse, do, dlse, call -> dq, dk, dv, dbias, dscales."""

    @staticmethod
    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scales: Tensor | None,
        valid: Tensor | None,
        seed: Tensor | None,
        table: Tensor | None,
        out: Tensor | None,
        lse: Tensor | None,
        do: Tensor,
        dlse: Tensor | None,
        call: Call,
    ) -> Tensors:
        inputs = Inputs(q, k, v, bias, scales, valid, seed, table)
        if _is_operator(call, *inputs, do, dlse):
            return torch.ops.isa_triton.backward.default(*inputs, out, lse, do, dlse, *call.flat())
        return tuple(_run_backward(inputs, out, lse, do, dlse, call))

    forward = run

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        *tensors, _, _, do, dlse, ctx.call = inputs
        ctx.save_for_backward(*tensors, do, dlse)
        ctx.save_for_forward(*tensors, do, dlse)

    @staticmethod
    def _plain(call: Call, given: Sequence[Tensor | None]) -> Callable[..., Tensors]:
        """The gradients as a function of q, k, v, bias, scales, do and dlse; out and lse are functions of those."""

        def gradients(*tensors: Any) -> Tensors:
            *inputs, do, dlse = tensors

            def f(*inputs: Any) -> Tensors:
                out, lse = _plain_attention(Inputs(*(*inputs, *given)), call)
                return (out,) if dlse is None else (out, lse)

            found = _pull_back(f, inputs, (do,) if dlse is None else (do, dlse))
            return tuple(do.new_empty(0) if gradient is None else gradient for gradient in found)

        return gradients

    @staticmethod
    def _inputs(tensors: Sequence[Any]) -> tuple[Sequence[Any], Any]:
        """What the gradients are differentiated by, and what else was given, of what was saved."""
        inputs, given, do_and_dlse = tensors[:DIFFERENTIABLE], tensors[DIFFERENTIABLE:-2], tensors[-2:]
        return (*inputs, *do_and_dlse), given

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        tensors, given = _AttentionBackward._inputs(ctx.saved_tensors)
        *found, ddo, ddlse = _pull_back(_AttentionBackward._plain(ctx.call, given), tensors, cotangents)
        return *found, *NONE, None, None, ddo, ddlse, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Any, Any]:
        n, (*tensors, call) = info.batch_size, inputs
        given, at = len(Inputs._fields), 1 + len(call.partition)  # of the heads
        folded = [*_folded_inputs(tensors[:given], in_dims, n, at)]
        folded += [_fold(x, dim, n, at) for x, dim in zip(tensors[given:], in_dims[given:], strict=False)]
        found = _apply(_AttentionBackward, *folded, call)
        bias = folded[3]
        places = at, at, at, None if bias is None else bias.dim() - 3, None if folded[4] is None else 0
        unfolded = (x if heads is None else _unfold(x, n, heads) for x, heads in zip(found, places, strict=True))
        return tuple(unfolded), places


def _keeps_output(q: Tensor, v: Tensor, call: Call) -> bool:
    return BY_NAME[call.backend].keeps_output(q, v, call.partition)


class _AttentionForwardMode(_Attention):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor | None]:
        saved = ctx.saved_tensors[: len(Inputs._fields)]
        tensors, given = saved[:DIFFERENTIABLE], saved[DIFFERENTIABLE:]

        def f(*tensors: Any) -> Tensors:
            return _plain_attention(Inputs(*(*tensors, *given)), ctx.call)

        out, lse = _push_forward(f, tensors, tangents[:DIFFERENTIABLE])
        return out, lse if ctx.call.with_lse else None


class _AttentionBackwardForwardMode(_AttentionBackward):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensors:
        n = len(Inputs._fields)
        tangents = (*tangents[:DIFFERENTIABLE], *tangents[n + 2 : n + 4])  # all but those of out and lse
        tensors, given = _AttentionBackward._inputs(ctx.saved_tensors)
        return _push_forward(_AttentionBackward._plain(ctx.call, given), tensors, tangents)


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
    tensors, _, call = _taken(inputs)
    _Attention.setup_context(ctx, (*tensors, call), output)


def _differentiate_operator(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
    *of_tensors, _ = _Attention.backward(ctx, *gradients)
    return *of_tensors, *[None] * len(Call._fields)


# An exported graph holds the operator without the Function around it, and must train all the same.
torch.library.register_autograd(
    "isa_triton::forward", _differentiate_operator, setup_context=_setup_operator, lib=_library
)


def _folded_inputs(tensors: Sequence[Any], dims: Sequence[Any], n: int, at: int) -> Sequence[Any]:
    """`Inputs` whose vmapped dimension has become more heads, which stand at `at`."""
    q, k, v, bias, scales, valid, seed, table = tensors
    for name, dim in (("valid", dims[5]), ("table", dims[7])):
        if dim is not None:
            raise NotImplementedError(f"torch.func.vmap has no `{name}` of its own for each call: make them one batch")
    of_bias = None if bias is None else bias.dim() - 3 - (dims[3] is not None)
    places = at, at, at, of_bias, 0
    folded = (_fold(x, dim, n, i) for x, dim, i in zip((q, k, v, bias, scales), dims, places, strict=False))
    return *folded, valid, _fold(seed, dims[6], n, 0), table


def _fold(x: Tensor | None, dim: int | None, n: int, heads: int | None) -> Tensor | None:
    """A vmapped dimension becomes more heads: all that attention does is independent for every head."""
    if x is None or heads is None:
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
