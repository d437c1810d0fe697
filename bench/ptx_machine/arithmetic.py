"""Instructions on numbers of one thread: integers, floats, comparisons, bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.ptx_machine.forms import Execute, Operands, form
from bench.ptx_machine.registers import Array, bf16, numbers, reader, writer

INTEGERS = "u16|s16|u32|s32|u64|s64"
BITS = "pred|b16|b32|b64"
SMALLEST = np.float32(2**-126)  # of normal numbers


def rows(
    pattern: str, types: str, section: str, compute: Callable[..., Any], made: bool = False, result: str = "",
) -> None:  # fmt: skip
    """A row of the table for instructions that compute one number of others.

    Args:
        pattern: of opcodes.
        types: of the operands, the result first: a name, or the number of the group of the pattern that is one.
        compute: from arrays to an array.
        made: `compute` makes that function of the pattern's groups, but for those that are types.
        result: what the result is cast to, where it is not what NumPy makes it.
    """
    words = types.split()

    @form(pattern, " ".join(["d", *["a"] * (len(words) - 1)]), section)
    def build(operands: Operands, *groups: Any) -> Execute:
        kinds = [groups[int(word) - 1] if word.isdigit() else word for word in words]
        function = compute(*groups) if made else compute
        put, gets = writer(operands[0], kinds[0]), [reader(x, k) for x, k in zip(operands[1:], kinds[1:], strict=True)]
        if len(gets) == 1:
            (a,) = gets
            return lambda s: put(s, function(a(s)))
        if len(gets) == 2:
            a, b = gets
            return lambda s: put(s, function(a(s), b(s)))
        return lambda s: put(s, function(*(get(s) for get in gets)))


def flush(x: Array) -> Array:
    """Subnormal numbers as zeros of their sign."""
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def flushing(function: Callable[..., Array]) -> Callable[..., Callable[..., Array]]:
    """Makes a function of floats of whether it flushes, before and after."""

    def make(flushes: str | None, *_: Any) -> Callable[..., Array]:
        return (lambda *x: flush(function(*map(flush, x)))) if flushes else function

    return make


# -- integers ----------------------------------------------------------------------------------------------------------


def quotient(a: Array, b: Array) -> Array:
    """a / b towards zero; by zero it is all bits, as GPUs have it."""
    by, ones = np.where(b == 0, b.dtype.type(1), b), a.dtype.type(-1) if a.dtype.kind == "i" else ~a.dtype.type(0)
    if a.dtype.kind == "i":
        floor = a // by
        floor = floor + ((a % by != 0) & ((a < 0) != (by < 0)))
        return np.where(b == 0, ones, floor).astype(a.dtype)
    return np.where(b == 0, ones, a // by)


def high(a: Array, b: Array) -> Array:
    """The upper half of a product of 32 bits."""
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def high64(a: Array, b: Array) -> Array:
    """The upper half of an unsigned product of 64 bits."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    return a1 * b1 + (middle >> half) + ((middle & low) + a0 * b1 >> half)


def wide(*groups: str) -> Callable[..., Array]:
    """a * b (+ c) in twice the bits."""
    dtype = np.dtype(f"{'i' if groups[0][0] == 's' else 'u'}{int(groups[0][1:]) // 4}")
    return lambda a, b, *c: sum(c, a.astype(dtype) * b.astype(dtype))


def shift(left: bool) -> Callable[[Array, Array], Array]:
    def apply(a: Array, b: Array) -> Array:
        width = 8 * a.itemsize
        amount = np.minimum(b, width - 1).astype(a.dtype)
        if left:
            return np.where(b >= width, a.dtype.type(0), a << amount)
        return np.where(b >= width, a >> (width - 1) if a.dtype.kind == "i" else a.dtype.type(0), a >> amount)

    return apply


def field(a: Array, start: Array, length: Array) -> Array:
    """`length` bits of a from `start` on, extended by their sign, or by that of the highest bit there is."""
    width = 8 * a.itemsize
    start, length = np.minimum(start & 255, width), np.minimum(length & 255, width)
    top = np.minimum(start + length, width)
    bits = shift(True)(a, width - top)
    shifted = shift(False)(bits, np.where(length == 0, 0, width - top + start))
    return np.where(length == 0, a.dtype.type(0), shifted)


def insert(a: Array, b: Array, start: Array, length: Array) -> Array:
    """b with the lowest `length` bits of a from `start` on."""
    start, length = start & 255, length & 255
    ones = np.where(length >= 32, np.uint32(0xFFFFFFFF), shift(True)(np.ones_like(length, np.uint32), length) - 1)
    mask = shift(True)(ones.astype(np.uint32), start)
    return (shift(True)(a, start) & mask) | (b & ~mask)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """Bytes of b and a, four of eight, or their signs."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    source = np.stack([a, b], 1).view(np.uint8)  # [threads, 8]
    nibbles = (selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32)) & np.uint32(15)
    chosen = np.take_along_axis(source, (nibbles & 7).astype(np.int64), 1)
    return np.where(nibbles & 8, (chosen >> 7) * np.uint8(255), chosen).astype(np.uint8).view(np.uint32)[:, 0]


def funnel(direction: str, mode: str) -> Callable[[Array, Array, Array], Array]:
    """32 of the 64 bits of b and a, moved."""

    def apply(a: Array, b: Array, c: Array) -> Array:
        amount = (c & np.uint32(31) if mode == "wrap" else np.minimum(c, 32)).astype(np.uint64)
        both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
        moved = (both << amount) >> np.uint64(32) if direction == "l" else both >> amount
        return moved.astype(np.uint32)

    return apply


def logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Any function of three bits, by its table."""
    result = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for i in range(8):
        if int(table[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


def count_bits(a: Array) -> Array:
    return np.unpackbits(np.ascontiguousarray(a)[:, None].view(np.uint8), axis=1).sum(1).astype(np.uint32)


function: Any  # of this loop and those below
INTEGER, LOGIC = "Integer Arithmetic Instructions: ", "Logic and Shift Instructions: "
for name, function in (("add", np.add), ("sub", np.subtract), ("min", np.minimum), ("max", np.maximum)):
    rows(rf"{name}\.({INTEGERS})", "1 1 1", INTEGER + name, function)
for name, function in (("div", quotient), ("rem", lambda a, b: a - quotient(a, b) * b)):
    rows(rf"{name}\.({INTEGERS})", "1 1 1", INTEGER + name, function)
rows(rf"mul\.lo\.({INTEGERS})", "1 1 1", INTEGER + "mul", np.multiply)
rows(r"mul\.hi\.(u32|s32)", "1 1 1", INTEGER + "mul", high)
rows(r"mul\.hi\.(u64)", "1 1 1", INTEGER + "mul", high64)
rows(rf"mad\.lo\.({INTEGERS})", "1 1 1 1", INTEGER + "mad", lambda a, b, c: a * b + c)
for kind in ("u16", "s16", "u32", "s32"):
    doubled = f"{kind[0]}{2 * int(kind[1:])}"
    rows(rf"mul\.wide\.({kind})", f"{doubled} 1 1", INTEGER + "mul", wide, made=True)
    rows(rf"mad\.wide\.({kind})", f"{doubled} 1 1 {doubled}", INTEGER + "mad", wide, made=True)
rows(r"neg\.(s16|s32|s64)", "1 1", INTEGER + "neg", np.negative)
rows(r"abs\.(s16|s32|s64)", "1 1", INTEGER + "abs", np.abs)
rows(r"bfe\.(u32|s32|u64|s64)", "1 1 u32 u32", INTEGER + "bfe", field)
rows(r"bfi\.b32", "b32 b32 b32 u32 u32", INTEGER + "bfi", insert)
rows(r"popc\.(b32|b64)", "u32 1", INTEGER + "popc", count_bits)
for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
    rows(rf"{name}\.({BITS})", "1 1 1", LOGIC + name, function)
rows(rf"not\.({BITS})", "1 1", LOGIC + "not", np.invert)
rows(r"shl\.(b16|b32|b64)", "1 1 u32", LOGIC + "shl", shift(True))
rows(r"shr\.(u16|s16|u32|s32|u64|s64|b16|b32|b64)", "1 1 u32", LOGIC + "shr", shift(False))
rows(r"shf\.(l|r)\.(wrap|clamp)\.b32", "b32 b32 b32 u32", LOGIC + "shf", funnel, made=True)
rows(r"lop3\.b32", "b32 b32 b32 b32 u32", LOGIC + "lop3", logic)
rows(r"prmt\.b32", "b32 b32 b32 b32", "Data Movement and Conversion Instructions: prmt", permute)

# -- floats ------------------------------------------------------------------------------------------------------------


def multiply_add(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once but where fp64 rounds the sum itself."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)


def extremum(name: str) -> Callable[..., Any]:
    """min or max of two or three; NaN where asked for, else where all are."""
    quiet, loud = (np.fmin, np.minimum) if name == "min" else (np.fmax, np.maximum)

    def make(flushes: str | None, nan: str | None) -> Callable[..., Array]:
        function = loud if nan else quiet
        return flushing(lambda a, b, *c: function(function(a, b), *c) if c else function(a, b))(flushes)

    return make


def of_pairs(function: Callable[..., Array]) -> Callable[..., Array]:
    """On two fp32 in 64 bits."""

    def apply(*pairs: Array) -> Array:
        return np.ascontiguousarray(function(*(np.ascontiguousarray(x).view(np.float32) for x in pairs))).view(
            np.uint64
        )

    return apply


def _from_bf16(x: Array) -> Array:
    return numbers(np.ascontiguousarray(x), "bf16")


def of_bf16(function: Callable[..., Array]) -> Callable[..., Array]:
    """On bf16, as bits, computed in fp32."""
    return lambda *x: bf16(function(*map(_from_bf16, x)))


FLOAT, HALF = "Floating Point Instructions: ", "Half Precision Floating Point Instructions: "
F32 = r"(?:\.rn)?(\.ftz)?\.f32"
for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
    rows(rf"{name}{F32}", "f32 f32 f32", FLOAT + name, flushing(function), made=True)
    rows(rf"{name}(?:\.rn)?\.f64", "f64 f64 f64", FLOAT + name, function)
    rows(rf"{name}(?:\.rn)?\.f16", "f16 f16 f16", HALF + name, function)
    rows(rf"{name}(?:\.rn)?\.bf16", "bf16 bf16 bf16", HALF + name, of_bf16(function))
    rows(rf"{name}(?:\.rn)?\.f32x2", "b64 b64 b64", FLOAT + name, of_pairs(function))
rows(r"fma\.rn(\.ftz)?\.f32", "f32 f32 f32 f32", FLOAT + "fma", flushing(multiply_add), made=True)
rows(r"fma\.rn\.f32\.(f16)", "f32 1 1 f32", FLOAT + "fma, mixed precision",
     lambda a, b, c: multiply_add(a.astype(np.float32), b, c))  # fmt: skip
rows(r"fma\.rn\.f32\.(bf16)", "f32 1 1 f32", FLOAT + "fma, mixed precision",
     lambda a, b, c: multiply_add(_from_bf16(a), _from_bf16(b), c))  # fmt: skip
for name, function in (("add", np.add), ("sub", np.subtract)):
    mixed = FLOAT + f"{name}, mixed precision"
    rows(rf"{name}(?:\.rn)?\.f32\.(f16)", "f32 1 f32", mixed, lambda a, c, f=function: f(a.astype(np.float32), c))
    rows(rf"{name}(?:\.rn)?\.f32\.(bf16)", "f32 1 f32", mixed, lambda a, c, f=function: f(_from_bf16(a), c))
rows(r"fma\.rn\.f32x2", "b64 b64 b64 b64", FLOAT + "fma", of_pairs(multiply_add))
rows(r"fma\.rn\.f16", "f16 f16 f16 f16", HALF + "fma", multiply_add)
rows(r"fma\.rn\.bf16", "bf16 bf16 bf16 bf16", HALF + "fma", of_bf16(multiply_add))
for name in ("min", "max"):
    for count in (2, 3):
        rows(rf"{name}(\.ftz)?(\.NaN)?\.f32", "f32" + " f32" * count, FLOAT + name, extremum(name), made=True)
rows(r"div\.full(\.ftz)?\.f32", "f32 f32 f32", FLOAT + "div", flushing(np.divide), made=True)
rows(r"div\.rn(\.ftz)?\.f32", "f32 f32 f32", FLOAT + "div", flushing(np.divide), made=True)
for name, one in (
    ("neg", np.negative), ("abs", np.abs), (r"ex2\.approx", np.exp2), (r"lg2\.approx", np.log2),
    (r"rcp\.(?:rn|approx)", np.reciprocal), (r"sqrt\.(?:rn|approx)", np.sqrt),
    (r"rsqrt\.approx", lambda x: np.float32(1) / np.sqrt(x)),
):  # fmt: skip
    rows(rf"{name}(\.ftz)?\.f32", "f32 f32", FLOAT + name.split("\\")[0], flushing(one), made=True)

# -- comparisons -------------------------------------------------------------------------------------------------------

COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def compare(name: str, *_: str) -> Callable[[Array, Array], Array]:
    """A comparison of floats: none holds with NaN but those whose names end in "u"."""
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    ordered = COMPARE[name.removesuffix("u") if name not in COMPARE else name]
    if name not in COMPARE:
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: ordered(a, b) & ~(np.isnan(a) | np.isnan(b))


COMPARISON = "Comparison and Selection Instructions: "
rows(rf"setp\.(eq|ne|lt|le|gt|ge|lo|ls|hi|hs)\.({INTEGERS}|b16|b32|b64)", "pred 2 2", COMPARISON + "setp",
     lambda name, _: COMPARE[name], made=True)  # fmt: skip
rows(r"setp\.(eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|nan|num)\.(f32|f64|f16)", "pred 2 2", COMPARISON + "setp",
     compare, made=True)  # fmt: skip
rows(rf"selp\.({INTEGERS}|b16|b32|b64|f32|f64)", "1 1 1 pred", COMPARISON + "selp", lambda a, b, p: np.where(p, a, b))
