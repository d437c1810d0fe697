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
from tests.ptx_kernels import bits_of, dtype, elementwise, integers, run, wrapped

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
F32, F64 = np.float32, np.float64
Rows = list[tuple[str, str, Callable[..., Any]]]


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
    ("cvta.global.u64 {d}, {a}", "u64 u64", lambda a: a),  # all addresses are those of one space
    ("cvta.to.global.u64 {d}, {a}", "u64 u64", lambda a: a),
    ("cvta.shared.u32 {d}, {a}", "u32 u32", lambda a: a),
]


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
