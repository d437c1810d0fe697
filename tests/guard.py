"""Triton's interpreter, hardened: bf16 that is right, and every launch's memory accesses checked and counted.

Import after TRITON_INTERPRET=1 is set. `install()` mends the interpreter for this process; `watch()` observes launches:

    with guard.watch() as memory:
        launch.forward(...)
    assert memory.unwritten(out) == 0

`shuffled(seed)` runs the programs of every launch inside in a random order, as a GPU may.

Where kernels are compiled (`pytest --device cuda`, or ptx:sm_90) nothing is watched here: `unwritten` then counts the
NaN in a tensor that was all NaN before.

A launch fails on the spot when a lane outside its mask touches an address that no element of the launch's tensors has
(a view's gaps count as outside), when one store writes an address twice, and when a program writes what another has
read or written. Written for Triton 3.8, and runs with 3.6.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from triton.language import core  # noqa: F401  # see install
from triton.language.semantic import TritonSemantic

Array = np.ndarray[Any, Any]
Builder, Handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
NOBODY, MANY = -1, -2
NAME = os.environ.get("ISA_TRITON_DEVICE", "cpu")  # of the device of tests of the kernels, by `tests/conftest.py`
MACHINE = NAME.removeprefix("ptx:") if NAME.startswith("ptx:") else None  # the target whose PTX is executed
DEVICE = "cpu" if MACHINE else NAME  # of tensors
COMPILED = os.environ.get("TRITON_INTERPRET") != "1"


class AccessError(AssertionError):
    """A program touched memory that is not its own."""


# ---------------------------------------------------------------------------------------------------------- bfloat16
def bf16_to_fp32(bits: Array) -> Array:
    """The values of bf16 bit patterns.

    >>> bf16_to_fp32(np.array([0x3F80, 0xC000], np.uint16)).tolist()
    [1.0, -2.0]
    """
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: Array) -> Array:
    """The bit patterns of values, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _is_bf16(handle: Any) -> bool:
    return isinstance(handle, Handle) and handle.dtype.scalar == tl.bfloat16


def _values(handle: Any) -> Array:
    return bf16_to_fp32(handle.data) if _is_bf16(handle) else handle.data


def _bf16(values: Array) -> Any:
    return Handle(fp32_to_bf16(values), tl.bfloat16)


def _mend_bf16() -> None:
    """Compute bf16 on its values: the interpreter computes on the bit patterns, and truncates when it converts."""
    binary, unary, dot, cast = Builder.binary_op, Builder.unary_op, Builder.create_dot, Builder.cast_impl
    convert, reduce = Builder.create_fp_to_fp, interpreter.ReduceScanOpInterface.check_tensor

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if not (_is_bf16(left) or _is_bf16(right)):
            return binary(self, left, right, op)
        result = op(_values(left), _values(right))
        return Handle(result, tl.int1) if result.dtype == np.bool_ else _bf16(result)

    def unary_op(self: Any, operand: Any, op: Any) -> Any:
        return _bf16(op(_values(operand))) if _is_bf16(operand) else unary(self, operand, op)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        a, b = (Handle(_values(x), tl.float32) if _is_bf16(x) else x for x in (a, b))
        return dot(self, a, b, acc, *options)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if to.scalar == tl.bfloat16 and not _is_bf16(source):
            return _bf16(source.data)
        if _is_bf16(source) and to.scalar != tl.bfloat16:
            return Handle(_values(source).astype(interpreter._get_np_dtype(to)), to.scalar)
        return cast(self, source, to)

    def create_fp_to_fp(self: Any, source: Any, to: Any, rounding: Any) -> Any:
        plain = {source.dtype.scalar, to.scalar} <= {tl.bfloat16, tl.float16, tl.float32, tl.float64}
        return cast_impl(self, source, to) if plain else convert(self, source, to, rounding)

    def check_tensor(self: Any, operands: Any) -> None:
        assert not any(x.dtype.scalar == tl.bfloat16 for x in operands), "the interpreter cannot reduce bf16"
        reduce(self, operands)

    Builder.binary_op, Builder.unary_op, Builder.create_dot = binary_op, unary_op, create_dot
    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    interpreter.ReduceScanOpInterface.check_tensor = check_tensor


@functools.cache
def install() -> None:
    """Mend the interpreter for this process: bf16 right, calls of helpers faster, overflow checked in `watch` only."""
    _mend_bf16()
    _check_overflow(False)

    # The interpreter patches triton.language for every call of a helper; once a launch is enough, and a third faster.
    patch = interpreter._patch_lang

    def patch_lang(_: Any) -> Any:
        scope = patch(_mend_bf16)  # reaches tl and core, globals of this file
        tl.tensor.__index__ = lambda self: self.handle.data.item()  # in Triton 3.6 what NumPy 2.4 refuses
        return scope

    interpreter._patch_lang = patch_lang
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs)

    # It also makes its table of dtypes anew for every look-up.
    scalar = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda of: np.dtype(np.uint64) if of.scalar.is_ptr() else scalar(of.scalar)

    # And types and shapes, which do not change, for every operation.
    attributes: dict[Any, dict[str, Any]] = {}
    make_type, shape_of = tl.block_type.__init__, functools.cache(lambda *sizes: tl.tuple(map(tl.constexpr, sizes)))

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, *map(tl.core._unwrap_if_constexpr, shape)
        if key not in attributes:
            make_type(self, element_ty, shape)
            attributes[key] = vars(self)
        self.__dict__ = attributes[key]

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape = shape_of(*type.shape) if type.is_block() else shape_of()
        self.numel = tl.constexpr(type.numel if type.is_block() else 1)

    tl.block_type.__init__, tl.tensor.__init__ = init_type, init_tensor

    # Most dtypes that it compares are one object, and most tensors that it broadcasts are of one shape.
    equal, broadcast = tl.dtype.__eq__, TritonSemantic.broadcast_impl_value
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_impl_value


def _check_overflow(on: bool) -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=on, sanitize_overflow=on)


# ------------------------------------------------------------------------------------------------------------ memory
class Memory:
    """The elements of one launch's tensors, by address, and which programs read and wrote each."""

    def __init__(self, kernel: str, tensors: list[torch.Tensor]) -> None:
        self.kernel = kernel
        addresses = [element_addresses(tensor) for tensor in tensors]
        sizes = [np.full(a.size, t.element_size(), np.int8) for a, t in zip(addresses, tensors, strict=True)]
        self.address, first = np.unique(np.concatenate(addresses), return_index=True)
        self.size = np.concatenate(sizes)[first]
        self.loaded = 0  # elements, as often as they were
        self.reader = np.full(self.address.size, NOBODY, np.int32)
        self.writer = np.full(self.address.size, NOBODY, np.int32)

    def seats(self, pointers: Array, mask: Array, what: str) -> Array:
        """Indices of the elements that the unmasked pointers point to."""
        pointers, mask = np.broadcast_arrays(pointers, mask)
        wanted = pointers[mask].astype(np.int64)
        seats = np.searchsorted(self.address, wanted)
        found = self.address[np.minimum(seats, self.address.size - 1)] == wanted
        if not found.all():
            self.fail(f"{what} of {np.count_nonzero(~found)} elements of no tensor, first at {wanted[~found][0]:#x}")
        return seats

    def read(self, program: int, pointers: Array, mask: Array) -> None:
        seats = self.seats(pointers, mask, "load")
        self.loaded += seats.size
        if ((self.writer[seats] != NOBODY) & (self.writer[seats] != program)).any():
            self.fail(f"program {program} reads what another wrote")
        reader = self.reader[seats]
        self.reader[seats] = np.where((reader == NOBODY) | (reader == program), program, MANY)

    def write(self, program: int, pointers: Array, mask: Array) -> None:
        seats = self.seats(pointers, mask, "store")
        if distinct(seats).size != seats.size:
            self.fail(f"program {program} stores twice to one address at once")
        for other, verb in ((self.writer[seats], "wrote"), (self.reader[seats], "read")):
            if ((other != NOBODY) & (other != program)).any():
                self.fail(f"program {program} writes what another {verb}")
        self.writer[seats] = program

    def fail(self, what: str) -> None:
        raise AccessError(f"{self.kernel}: {what}")

    def written(self, addresses: Array) -> Array:
        seats = np.minimum(np.searchsorted(self.address, addresses), self.address.size - 1)
        return (self.address[seats] == addresses) & (self.writer[seats] != NOBODY)


class Unwatched:
    """What is known of launches on a device."""

    def unwritten(self, tensor: torch.Tensor) -> int:
        """How many elements are NaN still."""
        return int(tensor.isnan().sum())


@dataclasses.dataclass
class Watch:
    """The launches observed so far."""

    launches: list[Memory] = dataclasses.field(default_factory=list)

    def unwritten(self, tensor: torch.Tensor) -> int:
        """How many elements of a tensor no launch has written."""
        addresses = element_addresses(tensor)
        written = np.zeros(addresses.size, bool)
        for memory in self.launches:
            written |= memory.written(addresses)
        return int(np.count_nonzero(~written))

    def traffic(self) -> int:
        """Distinct bytes read plus distinct bytes written, added over the launches."""
        return sum(int(m.size[m.reader != NOBODY].sum() + m.size[m.writer != NOBODY].sum()) for m in self.launches)


def element_addresses(tensor: torch.Tensor) -> Array:
    """Sorted distinct addresses of a tensor's elements."""
    offsets = np.zeros(1, np.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = np.arange(size if stride else min(size, 1), dtype=np.int64)
        offsets = (offsets[:, None] + steps * stride).ravel()
    return distinct(offsets) * tensor.element_size() + tensor.data_ptr()


def distinct(numbers: Array) -> Array:
    """The sorted distinct ones; `np.unique` takes a hundred times longer for numbers that are nearly sorted.

    >>> distinct(np.array([3, 1, 3])).tolist()
    [1, 3]
    """
    ordered = np.sort(numbers, axis=None, kind="stable")
    return ordered[np.insert(ordered[1:] != ordered[:-1], 0, True)[: ordered.size]]


def _tensors(arguments: Any) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from _tensors(argument)
        elif isinstance(argument, torch.Tensor):
            yield argument


@contextmanager
def watch(overflow: bool = False) -> Iterator[Any]:
    """Check every load and store of the launches inside, and count them; every int32 operation too if `overflow`.

    Yields:
        A `Watch`, or `Unwatched` where kernels are compiled.
    """
    if COMPILED:
        yield Unwatched()
        return
    seen = Watch()
    prepare = interpreter.GridExecutor._init_args_hst
    replaced = {name: getattr(Builder, name) for name in ("create_masked_load", "create_masked_store")}
    replaced |= {name: getattr(Builder, name) for name in ("create_atomic_rmw", "create_atomic_cas")}

    def _init_args_hst(self: Any, args: Any, kwargs: Any) -> Any:
        on_host = prepare(self, args, kwargs)
        seen.launches.append(Memory(self.fn.__name__, list(_tensors([*on_host[0], *on_host[1].values()]))))
        return on_host

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        seen.launches[-1].read(self.grid_idx[0], pointers.data, mask.data)
        return replaced["create_masked_load"](self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
        seen.launches[-1].write(self.grid_idx[0], pointers.data, mask.data)
        return replaced["create_masked_store"](self, pointers, values, mask, *rest)

    def atomic(self: Any, *_: Any) -> Any:
        seen.launches[-1].fail("an atomic operation: its order, and so its result, is not determined")

    interpreter.GridExecutor._init_args_hst = _init_args_hst
    watching: dict[str, Callable[..., Any]] = dict(zip(replaced, (load, store, atomic, atomic), strict=True))
    _check_overflow(overflow)
    try:
        for name, method in watching.items():
            setattr(Builder, name, method)
        yield seen
    finally:
        _check_overflow(False)
        interpreter.GridExecutor._init_args_hst = prepare
        for name, method in replaced.items():
            setattr(Builder, name, method)


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Run the programs of the launches inside in orders drawn from `seed`."""
    generator = np.random.default_rng(seed)
    set_dim, set_idx = Builder.set_grid_dim, Builder.set_grid_idx
    order: list[tuple[int, ...]] = []

    def set_grid_dim(self: Any, *grid: int) -> None:
        set_dim(self, *grid)
        order[:] = generator.permutation(list(np.ndindex(*grid))).tolist()

    def set_grid_idx(self: Any, *program: int) -> None:
        set_idx(self, *order[np.ravel_multi_index(program, self.grid_dim)])

    Builder.set_grid_dim, Builder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield
    finally:
        Builder.set_grid_dim, Builder.set_grid_idx = set_dim, set_idx
