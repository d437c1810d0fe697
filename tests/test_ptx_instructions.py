"""Every row of the machine's table on numbers of one thread, against Python's own integers and NumPy's floats."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.ptx_machine import machine
from bench.ptx_machine.faults import Unsupported
from bench.ptx_machine.forms import TABLE
from tests import ptx_kernels
from tests.ptx_kernels import dtype, elementwise, run

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
F32, F64 = np.float32, np.float64
Rows = list[tuple[str, str, Callable[..., Any]]]


def bits_of(kind: str) -> int:
    return int(kind[1:])


def wrapped(value: int, kind: str) -> int:
    """An integer as a type holds it."""
    value %= 1 << bits_of(kind)
    return value - (1 << bits_of(kind)) if kind[0] == "s" and value >> bits_of(kind) - 1 else value


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def shifted(kind: str) -> Callable[[int, int], int]:
    return lambda a, b: a >> min(b, bits_of(kind)) if kind[0] == "s" else a % (1 << bits_of(kind)) >> min(b, 99)


def field(kind: str) -> Callable[[int, int, int], int]:
    def of(a: int, start: int, length: int) -> int:
        start, length, width = start & 255, length & 255, bits_of(kind)
        taken = (a >> start) & ((1 << length) - 1) if kind[0] == "u" else a
        if kind[0] == "s":
            digits = [(a >> min(start + i, width - 1)) & 1 for i in range(length)]
            if not length:
                return 0
            top = digits[-1] if start + length <= width else (a >> width - 1) & 1
            taken = sum(d << i for i, d in enumerate(digits)) - (top << length)
        return taken

    return of


def permuted(a: int, b: int, selector: int) -> int:
    data = (a % 2**32).to_bytes(4, "little") + (b % 2**32).to_bytes(4, "little")
    found = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = data[nibble & 7]
        found |= ((255 if byte >> 7 else 0) if nibble & 8 else byte) << 8 * i
    return found


def inserted(a: int, b: int, start: int, length: int) -> int:
    start, length = start & 255, length & 255
    mask = ((1 << length) - 1) << start & 0xFFFFFFFF
    return (a << start) & mask | b & ~mask


def any_function(table: int) -> Callable[[int, int, int], int]:
    def of(a: int, b: int, c: int) -> int:
        digits = ((a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1) for i in range(32))
        return sum((table >> digit & 1) << i for i, digit in enumerate(digits))

    return of


def funnel(left: bool, clamps: bool) -> Callable[[int, int, int], int]:
    def of(a: int, b: int, c: int) -> int:
        amount, both = min(c, 32) if clamps else c & 31, b << 32 | a
        return both << amount >> 32 if left else both >> amount

    return of


WHOLE: Rows = []  # instruction, types with the result's first, what it is of Python's integers
for k in INTEGERS:
    WHOLE += [
        (f"add.{k} {{d}}, {{a}}, {{b}}", f"{k} {k} {k}", lambda a, b: a + b),
        (f"sub.{k} {{d}}, {{a}}, {{b}}", f"{k} {k} {k}", lambda a, b: a - b),
        (f"min.{k} {{d}}, {{a}}, {{b}}", f"{k} {k} {k}", min),
        (f"max.{k} {{d}}, {{a}}, {{b}}", f"{k} {k} {k}", max),
        (f"mul.lo.{k} {{d}}, {{a}}, {{b}}", f"{k} {k} {k}", lambda a, b: a * b),
        (f"mad.lo.{k} {{d}}, {{a}}, {{b}}, {{c}}", f"{k} {k} {k} {k}", lambda a, b, c: a * b + c),
        (f"div.{k} {{d}}, {{a}}, {{b}}", f"{k} {k} {k}", lambda a, b: truncated(a, b) if b else -1),
        (f"rem.{k} {{d}}, {{a}}, {{b}}", f"{k} {k} {k}", lambda a, b: a - truncated(a, b) * b if b else None),
        *((f"setp.{n}.{k} {{d}}, {{a}}, {{b}}", f"pred {k} {k}", f) for n, f in (
            ("eq", lambda a, b: a == b), ("ne", lambda a, b: a != b), ("lt", lambda a, b: a < b),
            ("le", lambda a, b: a <= b), ("gt", lambda a, b: a > b), ("ge", lambda a, b: a >= b))),
        (f"shr.{k} {{d}}, {{a}}, {{b}}", f"{k} {k} u32", shifted(k)),
        (f"selp.{k} {{d}}, {{a}}, {{b}}, {{c}}", f"{k} {k} {k} pred", lambda a, b, c: a if c else b),
    ]  # fmt: skip
    if bits_of(k) < 64:
        w = f"{k[0]}{2 * bits_of(k)}"
        WHOLE += [
            (f"mul.wide.{k} {{d}}, {{a}}, {{b}}", f"{w} {k} {k}", lambda a, b: a * b),
            (f"mad.wide.{k} {{d}}, {{a}}, {{b}}, {{c}}", f"{w} {k} {k} {w}", lambda a, b, c: a * b + c),
        ]
    for to in ("u8", "s8", *INTEGERS):
        if bits_of(to) > 8:
            WHOLE.append((f"cvt.{to}.{k} {{d}}, {{a}}", f"{to} {k}", lambda a: a))
for k in ("s16", "s32", "s64"):
    WHOLE += [(f"neg.{k} {{d}}, {{a}}", f"{k} {k}", lambda a: -a), (f"abs.{k} {{d}}, {{a}}", f"{k} {k}", abs)]
for k in ("b16", "b32", "b64"):
    WHOLE += [
        (f"and.{k} {{d}}, {{a}}, {{b}}", f"{k} {k} {k}", lambda a, b: a & b),
        (f"or.{k} {{d}}, {{a}}, {{b}}", f"{k} {k} {k}", lambda a, b: a | b),
        (f"xor.{k} {{d}}, {{a}}, {{b}}", f"{k} {k} {k}", lambda a, b: a ^ b),
        (f"not.{k} {{d}}, {{a}}", f"{k} {k}", lambda a: ~a),
        (f"shl.{k} {{d}}, {{a}}, {{b}}", f"{k} {k} u32", lambda a, b: a << min(b, 99)),
        (f"mov.{k} {{d}}, {{a}}", f"{k} {k}", lambda a: a),
    ]
for k in ("u32", "s32", "u64", "s64"):
    WHOLE.append((f"bfe.{k} {{d}}, {{a}}, {{b}}, {{c}}", f"{k} {k} small small", field(k)))
WHOLE += [
    ("mul.hi.u32 {d}, {a}, {b}", "u32 u32 u32", lambda a, b: a * b >> 32),
    ("mul.hi.s32 {d}, {a}, {b}", "s32 s32 s32", lambda a, b: a * b >> 32),
    ("mul.hi.u64 {d}, {a}, {b}", "u64 u64 u64", lambda a, b: a * b >> 64),
    ("bfi.b32 {d}, {a}, {b}, {c}, {e}", "b32 b32 b32 small small", inserted),
    ("popc.b32 {d}, {a}", "u32 b32", lambda a: a.bit_count()),
    ("popc.b64 {d}, {a}", "u32 b64", lambda a: a.bit_count()),
    ("prmt.b32 {d}, {a}, {b}, {c}", "b32 b32 b32 u32", lambda a, b, c: permuted(a, b, c & 0xFFFF)),
    ("lop3.b32 {d}, {a}, {b}, {c}, 202", "b32 b32 b32 b32", any_function(202)),
    ("shf.l.wrap.b32 {d}, {a}, {b}, {c}", "b32 b32 b32 u32", funnel(True, False)),
    ("shf.r.wrap.b32 {d}, {a}, {b}, {c}", "b32 b32 b32 u32", funnel(False, False)),
    ("shf.l.clamp.b32 {d}, {a}, {b}, {c}", "b32 b32 b32 u32", funnel(True, True)),
    ("shf.r.clamp.b32 {d}, {a}, {b}, {c}", "b32 b32 b32 u32", funnel(False, True)),
    ("and.pred {d}, {a}, {b}", "pred pred pred", lambda a, b: a and b),
    ("or.pred {d}, {a}, {b}", "pred pred pred", lambda a, b: a or b),
    ("xor.pred {d}, {a}, {b}", "pred pred pred", lambda a, b: a != b),
    ("not.pred {d}, {a}", "pred pred", lambda a: not a),
    ("mov.pred {d}, {a}", "pred pred", bool),
]


def integers(kind: str, seed: int) -> np.ndarray[Any, Any]:
    """32 of a type: its ends, small ones, and any."""
    if kind == "pred":
        return np.random.default_rng(seed).integers(0, 2, 32).astype(np.uint32)
    if kind == "small":
        return (
            np.random.default_rng(seed)
            .permutation([0, 1, 2, 5, 8, 15, 16, 24, 31, 32, 33, 7, 3, 4, 9, 11] * 2)
            .astype(np.uint32)
        )
    ends = np.iinfo(dtype(kind))
    random = np.random.default_rng(seed)
    some = [ends.min, ends.max, 0, 1, ends.max // 2, 2, 3, 31, 32, 33, 7]
    every = [int.from_bytes(random.bytes(8), "little") >> int(random.integers(0, 64)) for _ in range(21)]
    return np.array([wrapped(x, kind) for x in random.permutation(np.array(some + every, object))], dtype(kind))


@pytest.mark.parametrize(("line", "types", "meaning"), WHOLE, ids=[f"{line.split()[0]}" for line, *_ in WHOLE])
def test_integers(line: str, types: str, meaning: Callable[..., Any]) -> None:
    result, *kinds = types.split()
    given = [integers(kind, seed) for seed, kind in enumerate(kinds, 3)]
    out = np.zeros(32, dtype(result))
    run(elementwise(line, result, *(kind.replace("small", "u32") for kind in kinds)), out, *given)
    for i in range(32):
        numbers = [bool(x[i]) if kind == "pred" else int(x[i]) for kind, x in zip(kinds, given, strict=True)]
        wanted = meaning(*numbers)
        if wanted is not None:  # the remainder of a division by zero
            assert int(out[i]) == (int(wanted) if result == "pred" else wrapped(int(wanted), result)), (line, numbers)


# -- floats ------------------------------------------------------------------------------------------------------------


def rounded(x: Any) -> Any:
    return F32(x)


def flushed(x: Any) -> Any:
    return F32(math.copysign(0, x)) if abs(x) < 2**-126 else F32(x)


def nan_or(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *x: math.nan if any(map(math.isnan, x)) else function(*x)


def quiet(function: Callable[..., Any]) -> Callable[..., Any]:
    def of(*x: Any) -> Any:
        numbers = [each for each in x if not math.isnan(each)]
        return function(numbers) if numbers else math.nan

    return of


def safe(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """With NumPy's infinities for Python's exceptions."""
    return lambda x: F32(function(F64(x)))


FLOATS: Rows = [
    ("add.f32 {d}, {a}, {b}", "f32 f32 f32", lambda a, b: a + b),
    ("add.rn.f32 {d}, {a}, {b}", "f32 f32 f32", lambda a, b: a + b),
    ("add.ftz.f32 {d}, {a}, {b}", "f32 f32 f32", lambda a, b: flushed(flushed(a) + flushed(b))),
    ("sub.f32 {d}, {a}, {b}", "f32 f32 f32", lambda a, b: a - b),
    ("mul.f32 {d}, {a}, {b}", "f32 f32 f32", lambda a, b: a * b),
    ("mul.ftz.f32 {d}, {a}, {b}", "f32 f32 f32", lambda a, b: flushed(flushed(a) * flushed(b))),
    ("add.f64 {d}, {a}, {b}", "f64 f64 f64", lambda a, b: a + b),
    ("sub.f64 {d}, {a}, {b}", "f64 f64 f64", lambda a, b: a - b),
    ("mul.f64 {d}, {a}, {b}", "f64 f64 f64", lambda a, b: a * b),
    ("add.f16 {d}, {a}, {b}", "f16 f16 f16", lambda a, b: a + b),
    ("sub.f16 {d}, {a}, {b}", "f16 f16 f16", lambda a, b: a - b),
    ("mul.f16 {d}, {a}, {b}", "f16 f16 f16", lambda a, b: a * b),
    ("fma.rn.f16 {d}, {a}, {b}, {c}", "f16 f16 f16 f16", lambda a, b, c: np.float16(F64(a) * F64(b) + F64(c))),
    ("fma.rn.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 f32", lambda a, b, c: F32(F64(a) * F64(b) + F64(c))),
    ("add.rn.f32.f16 {d}, {a}, {b}", "f32 f16 f32", lambda a, b: F32(a) + b),
    ("sub.rn.f32.f16 {d}, {a}, {b}", "f32 f16 f32", lambda a, b: F32(a) - b),
    ("fma.rn.f32.f16 {d}, {a}, {b}, {c}", "f32 f16 f16 f32", lambda a, b, c: F32(F64(a) * F64(b) + F64(c))),
    ("fma.rn.ftz.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 f32",
     lambda a, b, c: flushed(F32(F64(flushed(a)) * F64(flushed(b)) + F64(flushed(c))))),
    ("div.full.f32 {d}, {a}, {b}", "f32 f32 f32", lambda a, b: a / b),
    ("div.rn.f32 {d}, {a}, {b}", "f32 f32 f32", lambda a, b: a / b),
    ("min.f32 {d}, {a}, {b}", "f32 f32 f32", quiet(min)),
    ("max.f32 {d}, {a}, {b}", "f32 f32 f32", quiet(max)),
    ("max.ftz.f32 {d}, {a}, {b}", "f32 f32 f32", lambda a, b: quiet(max)(flushed(a), flushed(b))),
    ("min.NaN.f32 {d}, {a}, {b}", "f32 f32 f32", nan_or(min)),
    ("max.NaN.f32 {d}, {a}, {b}", "f32 f32 f32", nan_or(max)),
    ("min.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 f32", quiet(min)),
    ("max.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 f32", quiet(max)),
    ("max.NaN.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 f32", nan_or(max)),
    ("neg.f32 {d}, {a}", "f32 f32", lambda a: -a),
    ("abs.f32 {d}, {a}", "f32 f32", abs),
    ("ex2.approx.f32 {d}, {a}", "f32 f32", safe(np.exp2)),
    ("ex2.approx.ftz.f32 {d}, {a}", "f32 f32", lambda a: flushed(safe(np.exp2)(flushed(a)))),
    ("lg2.approx.f32 {d}, {a}", "f32 f32", safe(np.log2)),
    ("lg2.approx.ftz.f32 {d}, {a}", "f32 f32", lambda a: safe(np.log2)(flushed(a))),
    ("rcp.rn.f32 {d}, {a}", "f32 f32", lambda a: F32(1) / a),
    ("rcp.approx.ftz.f32 {d}, {a}", "f32 f32", lambda a: flushed(F32(1) / flushed(a))),
    ("sqrt.rn.f32 {d}, {a}", "f32 f32", np.sqrt),
    ("sqrt.approx.ftz.f32 {d}, {a}", "f32 f32", lambda a: np.sqrt(flushed(a))),
    ("rsqrt.approx.f32 {d}, {a}", "f32 f32", lambda a: F32(1) / np.sqrt(a)),
    ("selp.f32 {d}, {a}, {b}, {c}", "f32 f32 f32 pred", lambda a, b, c: a if c else b),
    ("mov.f32 {d}, {a}", "f32 f32", lambda a: a),
    ("cvt.rn.f16.f32 {d}, {a}", "f16 f32", np.float16),
    ("cvt.f32.f16 {d}, {a}", "f32 f16", F32),
    ("cvt.f64.f32 {d}, {a}", "f64 f32", F64),
    ("cvt.rn.f32.f64 {d}, {a}", "f32 f64", F32),
    *((f"setp.{n}.f32 {{d}}, {{a}}, {{b}}", "pred f32 f32", f) for n, f in (
        ("eq", lambda a, b: a == b), ("lt", lambda a, b: a < b), ("le", lambda a, b: a <= b),
        ("gt", lambda a, b: a > b), ("ge", lambda a, b: a >= b), ("ne", lambda a, b: a < b or a > b),
        ("equ", lambda a, b: not (a < b or a > b)), ("neu", lambda a, b: a != b), ("ltu", lambda a, b: not a >= b),
        ("leu", lambda a, b: not a > b), ("gtu", lambda a, b: not a <= b), ("geu", lambda a, b: not a < b),
        ("nan", lambda a, b: math.isnan(a) or math.isnan(b)), ("num", lambda a, b: not math.isnan(a + 0 * b) or
         not (math.isnan(a) or math.isnan(b))))),
]  # fmt: skip
SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-42, -1e-40, 65504.0, 3.4e38, 2**-126, 0.3, 1e-8]


def floats(kind: str, seed: int) -> np.ndarray[Any, Any]:
    """32 of a type: its ends, numbers that are none, and any."""
    if kind == "pred":
        return integers(kind, seed)
    random = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        return random.permutation(
            [*SPECIAL, *(random.standard_normal(18) * 10.0 ** random.integers(-6, 7, 18))]
        ).astype(dtype(kind))


@pytest.mark.parametrize(
    ("line", "types", "meaning"),
    FLOATS,
    ids=[line.partition(" {")[0] + f"-{len(types.split())}" for line, types, _ in FLOATS],
)
def test_floats(line: str, types: str, meaning: Callable[..., Any]) -> None:
    result, *kinds = types.split()
    given = [floats(kind, seed) for seed, kind in enumerate(kinds, 3)]
    out = np.zeros(32, dtype(result))
    run(elementwise(line, result, *kinds), out, *given)
    near = 2.0**-21 if any(word in line for word in ("approx", "full")) else 0.0
    with np.errstate(all="ignore"):
        for i in range(32):
            numbers = [bool(x[i]) if kind == "pred" else x[i] for kind, x in zip(kinds, given, strict=True)]
            wanted, found = dtype(result)(meaning(*numbers)), out[i]
            same = found == wanted or (wanted != wanted and found != found)
            assert same or abs(F64(found) - F64(wanted)) <= near * abs(F64(wanted)), (line, numbers, wanted, found)


def to_bf16(x: Any) -> int:
    """Bits, by comparing with both neighbours."""
    x = F32(x)
    if math.isnan(x):
        return 0x7FFF
    bits = int(x.view(np.uint32))
    low, rest = bits >> 16, bits & 0xFFFF
    return low + (rest > 0x8000 or (rest == 0x8000 and low & 1))


def from_bf16(bits: Any) -> Any:
    return np.array([int(bits) << 16], np.uint32).view(F32)[0]


BF16: Rows = [
    ("cvt.rn.bf16.f32 {d}, {a}", "bf16 f32", to_bf16),
    ("cvt.f32.bf16 {d}, {a}", "f32 bf16", from_bf16),
    ("add.bf16 {d}, {a}, {b}", "bf16 bf16 bf16", lambda a, b: to_bf16(from_bf16(a) + from_bf16(b))),
    ("sub.bf16 {d}, {a}, {b}", "bf16 bf16 bf16", lambda a, b: to_bf16(from_bf16(a) - from_bf16(b))),
    ("mul.bf16 {d}, {a}, {b}", "bf16 bf16 bf16", lambda a, b: to_bf16(from_bf16(a) * from_bf16(b))),
    ("fma.rn.bf16 {d}, {a}, {b}, {c}", "bf16 bf16 bf16 bf16",
     lambda a, b, c: to_bf16(F32(F64(from_bf16(a)) * F64(from_bf16(b)) + F64(from_bf16(c))))),
    ("add.rn.f32.bf16 {d}, {a}, {b}", "f32 bf16 f32", lambda a, b: from_bf16(a) + b),
    ("sub.rn.f32.bf16 {d}, {a}, {b}", "f32 bf16 f32", lambda a, b: from_bf16(a) - b),
    ("fma.rn.f32.bf16 {d}, {a}, {b}, {c}", "f32 bf16 bf16 f32",
     lambda a, b, c: F32(F64(from_bf16(a)) * F64(from_bf16(b)) + F64(c))),
    ("cvt.rn.bf16x2.f32 {d}, {a}, {b}", "b32 f32 f32", lambda a, b: to_bf16(a) << 16 | to_bf16(b)),
    ("cvt.rn.f16x2.f32 {d}, {a}, {b}", "b32 f32 f32",
     lambda a, b: int(np.float16(a).view(np.uint16)) << 16 | int(np.float16(b).view(np.uint16))),
    ("cvt.rna.tf32.f32 {d}, {a}", "b32 f32", lambda a: to_tf32(a)),
]  # fmt: skip


def to_tf32(x: Any) -> int:
    bits = int(F32(x).view(np.uint32))
    return bits if not math.isfinite(x) else (bits >> 13 << 13) + ((bits & 0x1FFF) >= 0x1000) * 0x2000


@pytest.mark.parametrize(("line", "types", "meaning"), BF16, ids=[line.split()[0] for line, *_ in BF16])
def test_narrow_floats(line: str, types: str, meaning: Callable[..., Any]) -> None:
    result, *kinds = types.split()
    with np.errstate(all="ignore"):
        given = [np.array([to_bf16(x) for x in floats("f32", s)], np.uint16) if kind == "bf16" else floats(kind, s)
                 for s, kind in enumerate(kinds, 3)]  # fmt: skip
        out = np.zeros(32, dtype(result))
        run(elementwise(line, result, *kinds), out, *given)
        for i in range(32):
            wanted = meaning(*(x[i] for x in given))
            numbers = (out[i], F32(wanted)) if result == "f32" else (int(out[i]), int(wanted))
            assert numbers[0] == numbers[1] or numbers[0] != numbers[0], (line, [x[i] for x in given])


WHOLE_OF_FLOATS = [
    (mode, kind, of)
    for mode in ("rzi", "rni", "rmi", "rpi")
    for kind in ("s32", "u32", "s64", "s16")
    for of in ("f32", "f16", "f64")
]


@pytest.mark.parametrize(("mode", "kind", "of"), WHOLE_OF_FLOATS)
def test_floats_as_integers(mode: str, kind: str, of: str) -> None:
    given, out, ends = floats(of, 5), np.zeros(32, dtype(kind)), np.iinfo(dtype(kind))
    given[:4] = [2.5, -2.5, 3.5, -0.5]
    run(elementwise(f"cvt.{mode}.{kind}.{of} {{d}}, {{a}}", kind, of), out, given)
    whole: Any = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}[mode]
    for x, found in zip(given, out, strict=True):
        number = float(x)
        wanted = 0 if math.isnan(number) else number if math.isinf(number) else whole(number)
        assert int(found) == int(min(max(wanted, int(ends.min)), int(ends.max)))


@pytest.mark.parametrize("kind", ["f16", "f32", "f64"])
@pytest.mark.parametrize("of", INTEGERS)
def test_integers_as_floats(kind: str, of: str) -> None:
    given, out = integers(of, 5), np.zeros(32, dtype(kind))
    run(elementwise(f"cvt.rn.{kind}.{of} {{d}}, {{a}}", kind, of), out, given)
    with np.errstate(all="ignore"):
        assert out.tolist() == [float(dtype(kind)(int(x))) for x in given]


@pytest.mark.parametrize("name", ["add", "sub", "mul", "fma.rn"])
def test_two_floats_at_once(name: str) -> None:
    given = [np.random.default_rng(i).standard_normal((32, 2)).astype(F32) for i in range(3)]
    given, out = given if name == "fma.rn" else given[:2], np.zeros(32, np.uint64)
    line = f"{name}.f32x2 {{d}}, {', '.join(f'{{{x}}}' for x in 'abc'[: len(given)])}"
    run(elementwise(line, "b64", *["b64"] * len(given)), out, *(x.view(np.uint64)[:, 0] for x in given))
    a, b, *c = (x.astype(F64) for x in given)
    wanted = {"add": a + b, "sub": a - b, "mul": a * b, "fma.rn": a * b + (c[0] if c else 0)}[name].astype(F32)
    assert (out[:, None].view(F32) == wanted).all()


# -- vectors, special registers, control flow --------------------------------------------------------------------------


def test_registers_are_packed_and_unpacked() -> None:
    given, out = np.arange(32, dtype=np.uint32) * 0x01030507 + 0xA1B2, np.zeros((32, 4), np.uint32)
    run(
        """
        mad.wide.u32 %rd3, %r0, 4, %rd1;
        ld.global.b32 %r1, [%rd3];
        mov.b32 {%rs1, %rs2}, %r1;
        mov.b32 %r2, {%rs2, %rs1};
        mov.b64 %rd4, {%r1, %r2};
        mov.b64 {%r3, _}, %rd4;
        mov.b64 {%rs3, %rs4, %rs5, %rs6}, %rd4;
        mov.b64 %rd5, {%rs6, %rs5, %rs4, %rs3};
        mov.b64 {%r4, %r5}, %rd5;
        mad.wide.u32 %rd3, %r0, 16, %rd0;
        st.global.v4.b32 [%rd3], {%r2, %r3, %r4, %r5};
        """, out, given)  # fmt: skip
    swapped = given >> 16 | given << 16
    assert (out == np.stack([swapped, given, given, swapped], 1)).all()


VECTORS = [(1, 8), (1, 16), (1, 32), (1, 64), (2, 16), (4, 16), (2, 32), (4, 32), (2, 64), (8, 32), (4, 64)]


@pytest.mark.parametrize(
    ("count", "bits", "space"),
    [*((*each, "global") for each in VECTORS), *((*each, "shared") for each in VECTORS if each[0] * each[1] <= 128)],
)
def test_memory(count: int, bits: int, space: str) -> None:
    size, file = bits // 8 * count, ptx_kernels.FILES[str(bits)]
    given, out = np.random.default_rng(0).integers(0, 256, 32 * size, np.uint8), np.zeros(32 * size, np.uint8)
    parts = ", ".join(f"{file}{10 + i}" for i in range(count))
    vector, values = (f".v{count}", f"{{{parts}}}") if count > 1 else ("", parts)
    through = f"""
        st.shared{vector}.b{bits} [%r2], {values};
        ld.shared{vector}.b{bits} {values}, [%r2];
    """ if space == "shared" else ""  # fmt: skip
    run(f"""
        mov.b32 %r1, global_smem;
        mad.lo.s32 %r2, %r0, {size}, %r1;
        mad.wide.u32 %rd3, %r0, {size}, %rd1;
        ld.global{vector}.b{bits} {values}, [%rd3];{through}
        mad.wide.u32 %rd3, %r0, {size}, %rd0;
        st.global{vector}.b{bits} [%rd3], {values};
        """, out, given, shared=32 * size)  # fmt: skip
    assert (out == given).all()


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("read", [None, "size", 0])
def test_copies_are_there_behind_their_wait(size: int, read: str | int | None) -> None:
    given, out = np.random.default_rng(0).integers(1, 256, 32 * size, np.uint8), np.ones(32 * size, np.uint8)
    count = "" if read is None else ", %r5"
    values = {4: "%r10", 8: "%rd10", 16: "{%r10, %r11, %r12, %r13}"}[size]
    kind = "v4.b32" if size == 16 else f"b{8 * size}"
    run(f"""
        mul.lo.s32 %r2, %r0, {size};
        mad.wide.u32 %rd3, %r0, {size}, %rd1;
        mov.b32 %r5, {size if read == "size" else 0};
        cp.async.ca.shared.global [%r2+0], [%rd3+0], {size}{count};
        cp.async.commit_group;
        cp.async.wait_group 0;
        mad.wide.u32 %rd3, %r0, {size}, %rd0;
        ld.shared.{kind} {values}, [%r2];
        st.global.{kind} [%rd3], {values};
        """, out, given, shared=32 * size)  # fmt: skip
    assert (out == (0 if read == 0 else given)).all()


def test_programs_and_threads_know_their_place() -> None:
    out = np.zeros((6, 64), np.uint32)
    run(
        """
        mov.u32 %r1, %ctaid.x;
        mov.u32 %r2, %nctaid.x;
        mad.lo.u32 %r3, %r1, 64, %r0;
        mad.lo.u32 %r4, %r2, 1000, %r3;
        mad.wide.u32 %rd3, %r3, 4, %rd0;
        st.global.b32 [%rd3], %r4;
        """, out, threads=64, programs=6)  # fmt: skip
    assert (out.reshape(-1) == 6000 + np.arange(6 * 64)).all()


def test_threads_part_and_meet_again() -> None:
    """Thread t adds 1 + 2 + ... + t, in a loop of its own length, odd ones twice that."""
    out = np.zeros(32, np.uint32)
    run(
        """
        mov.b32 %r1, 0;
        mov.b32 %r2, 0;
        $loop:
        setp.ge.u32 %p1, %r2, %r0;
        @%p1 bra $done;
        add.s32 %r2, %r2, 1;
        add.s32 %r1, %r1, %r2;
        bra.uni $loop;
        $done:
        and.b32 %r3, %r0, 1;
        setp.eq.b32 %p2, %r3, 1;
        @!%p2 bra $store;
        {
        .reg .b32 twice;
        shl.b32 twice, %r1, 1;
        mov.b32 %r1, twice;
        }
        $store:
        mad.wide.u32 %rd3, %r0, 4, %rd0;
        st.global.b32 [%rd3], %r1;
        """, out)  # fmt: skip
    assert out.tolist() == [t * (t + 1) // 2 * (1 + t % 2) for t in range(32)]


# -- lanes -------------------------------------------------------------------------------------------------------------


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """PTX ISA: shfl.sync, its pseudo-code."""
    segment, limit = c >> 8 & 31, c & 31
    last, first = (lane & segment) | (limit & ~segment & 31), lane & segment
    j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment & 31)}[mode]
    holds = j >= last if mode == "up" else j <= last
    return (j if holds else lane), holds


@pytest.mark.parametrize("mode", ["bfly", "idx", "up", "down"])
@pytest.mark.parametrize("clamp", [31, 0, 0x181F, 0x1C03])
@pytest.mark.parametrize("says", [False, True])
def test_shuffles(mode: str, clamp: int, says: bool) -> None:
    given, where = np.arange(100, 132, dtype=np.uint32), np.arange(32, dtype=np.uint32) * 7 % 32
    out, inside = np.zeros(32, np.uint32), np.ones(32, np.uint32)
    run(f"""
        mad.wide.u32 %rd4, %r0, 4, %rd1;
        ld.global.b32 %r1, [%rd4];
        mad.wide.u32 %rd4, %r0, 4, %rd2;
        ld.global.b32 %r2, [%rd4];
        mov.pred %p1, -1;
        shfl.sync.{mode}.b32 %r3{"|%p1" * says}, %r1, %r2, {clamp}, -1;
        mad.wide.u32 %rd4, %r0, 4, %rd0;
        st.global.b32 [%rd4], %r3;
        selp.b32 %r5, 1, 0, %p1;
        mad.wide.u32 %rd4, %r0, 4, %rd3;
        st.global.b32 [%rd4], %r5;
        """, out, given, where, inside)  # fmt: skip
    wanted = [shuffled(mode, lane, int(where[lane]), clamp) for lane in range(32)]
    assert out.tolist() == [100 + source for source, _ in wanted]
    assert inside.tolist() == [holds or not says for _, holds in wanted]


REDUCTIONS = [
    *((f"redux.sync.{name}.{kind}", kind, function) for kind in ("u32", "s32") for name, function in
      (("max", max), ("min", min), ("add", sum))),
    ("redux.sync.and.b32", "u32", lambda x: int(np.bitwise_and.reduce(np.array(x, np.uint32)))),
    ("redux.sync.or.b32", "u32", lambda x: int(np.bitwise_or.reduce(np.array(x, np.uint32)))),
    ("redux.sync.xor.b32", "u32", lambda x: int(np.bitwise_xor.reduce(np.array(x, np.uint32)))),
]  # fmt: skip


@pytest.mark.parametrize(("opcode", "kind", "meaning"), REDUCTIONS)
def test_reductions_of_a_warp(opcode: str, kind: str, meaning: Callable[[list[int]], int]) -> None:
    given, out = integers(kind, 3), np.zeros(32, dtype(kind))
    run(elementwise(f"{opcode} {{d}}, {{a}}, -1", kind, kind), out, given)
    assert out.tolist() == [wrapped(meaning([int(x) for x in given]), kind)] * 32


@pytest.mark.parametrize(("opcode", "wanted"), [("redux.sync.max.f32", 7.0), ("redux.sync.min.f32", -3.0),
                                                ("redux.sync.max.NaN.f32", math.nan)])  # fmt: skip
def test_reductions_of_floats(opcode: str, wanted: float) -> None:
    given, out = np.zeros(32, F32), np.zeros(32, F32)
    given[[3, 8, 9]] = 7.0, -3.0, math.nan
    run(elementwise(f"{opcode} {{d}}, {{a}}, -1", "f32", "f32"), out, given)
    np.testing.assert_array_equal(out, np.full(32, wanted, F32))


@pytest.mark.parametrize(("mode", "kind"), [("any", "pred"), ("all", "pred"), ("ballot", "b32")])
@pytest.mark.parametrize("votes", [0, 0x80000001, 0xFFFFFFFF])
def test_votes(mode: str, kind: str, votes: int) -> None:
    given, out = np.array([votes >> i & 1 for i in range(32)], np.uint32), np.zeros(32, np.uint32)
    run(elementwise(f"vote.sync.{mode}.{kind} {{d}}, {{a}}, -1", kind, "pred"), out, given)
    assert set(out.tolist()) == {{"any": votes > 0, "all": votes == 0xFFFFFFFF, "ballot": votes}[mode]}


def test_one_lane_of_a_warp_is_elected() -> None:
    out = np.zeros(64, np.uint32)
    run(
        """
        elect.sync %r1|%p1, -1;
        selp.b32 %r2, 10, 20, %p1;
        add.s32 %r2, %r2, %r1;
        mad.wide.u32 %rd3, %r0, 4, %rd0;
        st.global.b32 [%rd3], %r2;
        """, out, threads=64)  # fmt: skip
    assert out.tolist() == ([10] + [20] * 31) * 2


# -- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [
    "add.sat.s32 %r1, %r2, %r3;", "add.s32 %r1, %r2;", "add.s32 %r1, %r2, %r3, %r4;", "add.rz.f32 %r1, %r2, %r3;",
    "max.s32 %r1, %r2, %r3, %r4;", "mul.f32.sat %r1, %r2, %r3;", "shfl.sync.bfly.b32 %r1, %r2, 1, 31;",
    "ld.volatile.global.b32 %r1, [%rd0];", "ld.shared.v2.b32 {%r1, %r2, %r3}, [%r0];", "bar.sync 1;",
    "bar.sync 0, 64;", "atom.global.add.u32 %r1, [%rd0], 1;", "mov.b64 %rd1, {%rs1, %rs2};",
    "cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r2;",
    "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1, %r2}, {%r3, %r4, %r5, %r6}, {%r7, %r8}, {%r1, %r2};",
    "mov.u32 %r1, %laneid;", "add.s32 %r1, %r2, 0f3F800000;", "add.s64 %rd1, %r1, %rd2;", "add.s32 %rs1, %r1, %r2;",
    "call.uni f;", "bra $nowhere;", ".reg .b128 %q1;", "setp.lt.and.s32 %p1, %r1, %r2, %p2;",
])  # fmt: skip
def test_what_the_machine_does_not_know_it_does_not_run(line: str) -> None:
    with pytest.raises(Unsupported):
        run(line, np.zeros(32, np.uint32), shared=1024)


def test_every_row_says_which_section_of_the_ptx_isa_it_is_of() -> None:
    assert all(row.section.strip(": ") for row in TABLE)
    assert len(TABLE) > 100


def test_a_kernel_needs_an_end() -> None:
    with pytest.raises(Unsupported, match="does not end"):
        machine.compiled(ptx_kernels.text("", 1).replace("ret;", "add.s32 %r1, %r1, 1;"))
