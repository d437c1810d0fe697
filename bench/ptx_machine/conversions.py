"""Conversions between types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from bench.ptx_machine.arithmetic import rows
from bench.ptx_machine.registers import NUMBERS, Array, bf16, numbers

SECTION = "Data Movement and Conversion Instructions: cvt"
WHOLE = "u8|s8|u16|s16|u32|s32|u64|s64"


def to_whole(*groups: Any) -> Callable[[Array], Array]:
    """Floats towards zero, or to the nearest even, and at the ends of the range at most; NaN is zero."""
    mode, kind = groups[0], np.dtype(NUMBERS[groups[1]])
    least, most = float(np.iinfo(kind).min), float(np.iinfo(kind).max)

    def apply(a: Array) -> Array:
        wide = np.where(np.isnan(a), 0, a).astype(np.float64)
        whole = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode](wide)
        inside = np.where((whole > least) & (whole < most), whole, 0).astype(kind)
        return np.where(
            whole <= least,
            kind.type(np.iinfo(kind).min),
            np.where(whole >= most, kind.type(np.iinfo(kind).max), inside),
        )

    return apply


def pair(kind: str) -> Callable[[Array, Array], Array]:
    """Two fp32 as two of 16 bits in one register, the first above the second."""

    def bits(x: Array) -> Array:
        return bf16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)

    return lambda high, low: bits(low).astype(np.uint32) | bits(high).astype(np.uint32) << np.uint32(16)


def to_tf32(x: Array) -> Array:
    """To 10 bits of mantissa, ties away from zero; bits of fp32."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits)


def casts(*groups: Any) -> Callable[[Array], Array]:
    kind = np.dtype(NUMBERS[groups[0]])
    return lambda a: a.astype(kind)


rows(rf"cvt\.({WHOLE})\.({WHOLE})", "1 2", SECTION, casts, made=True)
rows(rf"cvt\.rn\.(f16|f32|f64)\.({WHOLE})", "1 2", SECTION, casts, made=True)
rows(r"cvt\.rn\.(f16|f32)\.(f32|f64)", "1 2", SECTION, casts, made=True)
rows(r"cvt\.(f32|f64)\.(f16|f32)", "1 2", SECTION, casts, made=True)
rows(r"cvt\.f32\.bf16", "f32 bf16", SECTION, lambda a: numbers(np.ascontiguousarray(a), "bf16"))
rows(r"cvt\.rn\.bf16\.f32", "bf16 f32", SECTION, bf16)
rows(rf"cvt\.(rzi|rni|rmi|rpi)\.({WHOLE})\.(f16|f32|f64)", "2 3", SECTION, to_whole, made=True)
rows(r"cvt\.rn\.(f16|bf16)x2\.f32", "b32 f32 f32", SECTION, pair, made=True)
rows(r"cvt\.rna\.tf32\.f32", "b32 f32", SECTION, to_tf32)
