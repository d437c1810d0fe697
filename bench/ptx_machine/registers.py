"""Types, and registers read and written as numbers of a type (PTX ISA: Fundamental Types; Operand Size Exceeding
Instruction-Type Size).

A register holds bits, one row of them for all threads; an instruction's type says what they mean. bf16 stays bits in
uint16, which NumPy has no numbers for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.ptx_machine.faults import Unsupported
from bench.ptx_machine.parse import SHARED, Operand, Register, Word

if TYPE_CHECKING:
    from bench.ptx_machine.threads import Threads

Array = np.ndarray[Any, Any]
Read = Callable[["Threads"], Array]
Write = Callable[["Threads", Array], None]
STORED: dict[int, Any] = {1: np.bool_, 16: np.uint16, 32: np.uint32, 64: np.uint64}  # a register's bits
NUMBERS: dict[str, Any] = {
    "pred": np.bool_, "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64,
    **{f"{sign}{8 * size}": np.dtype(f"{'i' if sign == 's' else 'u'}{size}").type
       for sign in "bus" for size in (1, 2, 4, 8)},
}  # fmt: skip


def reader(operand: Operand, kind: str) -> Read:
    """A function that gives an operand as numbers of a type, one a thread, or one for all."""
    dtype = np.dtype(NUMBERS[kind])
    if isinstance(operand, Word):
        return _constant(operand.text, kind)
    if not isinstance(operand, Register):
        raise Unsupported(f"{operand} in the place of a number")
    width, row, bits = operand.width, operand.row, 8 * dtype.itemsize
    if (width == 1) != (kind == "pred") or (width < bits and width != 1):
        raise Unsupported(f"{operand.name}, a register of {width} bits, read as {kind}")
    stored = np.dtype(STORED[width])
    if stored == dtype:
        return lambda s: s.registers[width][row][s.lanes]
    if stored.itemsize == dtype.itemsize:
        return lambda s: s.registers[width][row][s.lanes].view(dtype)
    low = np.dtype(f"u{dtype.itemsize}")
    return lambda s: s.registers[width][row][s.lanes].astype(low).view(dtype)


def _constant(text: str, kind: str) -> Read:
    """A number, a special register, or where shared memory begins."""
    dtype = np.dtype(NUMBERS[kind])
    if text.startswith("%"):
        return lambda s: s.special(text)[s.lanes].astype(dtype)
    if (match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text)) and kind[0] in "bf":
        bits, size = int(match[1], 16), len(match[1]) // 2
        number = np.array([bits], f"u{size}")
        value = number.view(f"f{size}").astype(dtype) if dtype.kind == "f" else number.astype(dtype)
    elif dtype.kind == "b" and text in ("0", "1", "-1"):
        value = np.array([text != "0"])
    elif re.fullmatch(r"-?(\d+|0x[0-9a-fA-F]+)U?", text) and dtype.kind in "iu":
        whole = int(text.rstrip("U"), 0) % (1 << 8 * dtype.itemsize)
        value = np.array([whole], f"u{dtype.itemsize}").view(dtype)
    elif text == SHARED:
        value = np.zeros(1, dtype)
    else:
        raise Unsupported(f"{text} as {kind}")
    value.flags.writeable = False
    return lambda s: value


def writer(operand: Operand, kind: str) -> Write:
    """A function that writes numbers of a type into a register, extended to its bits by their sign."""
    if operand == Word("_"):
        return lambda s, x: None
    if not isinstance(operand, Register):
        raise Unsupported(f"{operand} in the place of a register")
    dtype, stored, width, row = np.dtype(NUMBERS[kind]), np.dtype(STORED[operand.width]), operand.width, operand.row
    if (width == 1) != (kind == "pred") or dtype.itemsize > stored.itemsize:
        raise Unsupported(f"{operand.name}, a register of {width} bits, written as {kind}")

    def put(s: Threads, x: Array) -> None:
        s.registers[width][row][s.lanes] = x if x.dtype == stored else x.view(stored)

    if dtype.itemsize == stored.itemsize:
        return put
    extended = np.dtype(f"{'i' if dtype.kind == 'i' else 'u'}{stored.itemsize}")
    as_bits = dtype if dtype.kind in "iu" else np.dtype(f"u{dtype.itemsize}")
    return lambda s, x: put(s, x.view(as_bits).astype(extended))


def bf16(x: Array) -> Array:
    """fp32 as bits of bf16, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def numbers(bits: Array, kind: str) -> Array:
    """Bits of fp16, bf16 or, of 32 bits, tf32 as fp32."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind == "bf16":
        return (bits.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return (bits.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)  # matrix units look at 19 bits
