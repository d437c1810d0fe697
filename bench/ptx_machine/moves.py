"""Data between registers, and between them and memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.ptx_machine.faults import Unsupported
from bench.ptx_machine.forms import Execute, Operands, form
from bench.ptx_machine.parse import Address, Operand, Register, Vector, Word
from bench.ptx_machine.registers import NUMBERS, Array, Read, reader, writer
from bench.ptx_machine.threads import Threads

SECTION = "Data Movement and Conversion Instructions: "
TYPES = r"[bus](?:8|16|32|64)|f(?:32|64)"


@form(rf"mov\.(pred|{TYPES})", "d a", SECTION + "mov")
def move(operands: Operands, kind: str) -> Execute:
    put, a = writer(operands[0], kind), reader(operands[1], kind)
    return lambda s: put(s, a(s))


@form(r"mov\.b(32|64)", "d {}", SECTION + "mov")
def pack(operands: Operands, bits: str) -> Execute:
    kind, parts = _parts(operands[1], bits)
    put, gets = writer(operands[0], f"b{bits}"), [reader(part, kind) for part in parts]
    whole = NUMBERS[f"b{bits}"]

    def execute(s: Threads) -> None:
        put(s, np.stack([s.spread(get(s)) for get in gets], 1).view(whole)[:, 0])

    return execute


@form(r"mov\.b(32|64)", "{} a", SECTION + "mov")
def unpack(operands: Operands, bits: str) -> Execute:
    kind, parts = _parts(operands[0], bits)
    puts, get = [writer(part, kind) for part in parts], reader(operands[1], f"b{bits}")

    def execute(s: Threads) -> None:
        found = np.ascontiguousarray(get(s))[:, None].view(NUMBERS[kind])
        for i, put in enumerate(puts):
            put(s, np.ascontiguousarray(found[:, i]))

    return execute


def _parts(vector: Any, bits: str) -> tuple[str, tuple[Register | Word, ...]]:
    """The type of a vector's parts, which make up so many bits, and the parts."""
    parts = vector.parts
    if len(parts) not in (2, 4) or int(bits) // len(parts) < 16:
        raise Unsupported(f"{vector} of {bits} bits")
    return f"b{int(bits) // len(parts)}", parts


@form(r"cvta\.(?:to\.)?(?:global|shared)\.u(32|64)", "d a", SECTION + "cvta")
def convert_address(operands: Operands, bits: str) -> Execute:
    put, a = writer(operands[0], f"u{bits}"), reader(operands[1], f"u{bits}")
    return lambda s: put(s, a(s))


# -- memory ------------------------------------------------------------------------------------------------------------


def addresses(operand: Address, kind: str) -> Read:
    """A function that gives an address for each thread."""
    base, offset = reader(operand.base, kind), operand.offset
    if not offset:
        return lambda s: s.spread(base(s))
    added = np.array([offset % (1 << int(kind[1:]))], NUMBERS[kind])
    return lambda s: s.spread(base(s) + added)


@form(rf"ld\.param\.({TYPES})", "d [a]", SECTION + "ld")
def load_parameter(operands: Operands, kind: str) -> Execute:
    put, place, size = writer(operands[0], kind), operands[1], np.dtype(NUMBERS[kind]).itemsize
    name, offset = place.base.text, place.offset

    def execute(s: Threads) -> None:
        start = s.module.parameters[name] + offset
        put(s, np.frombuffer(s.parameters[start : start + size], NUMBERS[kind]))

    return execute


def _access(kind: str, count: str | None, values: Operand) -> tuple[int, list[Any]]:
    """Bytes of one number, and the operands that are read or written."""
    parts: list[Any] = list(values.parts) if isinstance(values, Vector) else [values]
    if len(parts) != int(count or 1):
        raise Unsupported(f"{len(parts)} operands of a vector of {count or 1}")
    return np.dtype(NUMBERS[kind]).itemsize, parts


CACHED = r"(?:\.(?:ca|cg|cs))?(?:\.L1::evict_(?:last|first|normal)|\.L1::no_allocate)?"
for vector, values in (("()", "d"), (r"\.v(2|4|8)", "{}")):

    @form(rf"ld\.global{CACHED}(?:\.nc)?{vector}\.({TYPES})", f"{values} [a]", SECTION + "ld")
    def load_global(operands: Operands, count: str, kind: str) -> Execute:
        size, parts = _access(kind, count, operands[0])
        at, puts = addresses(operands[1], "u64"), [writer(part, kind) for part in parts]

        def execute(s: Threads) -> None:
            _spread_out(s, s.global_memory.load(s, s.numbers(), at(s), size * len(puts)), puts, kind)

        return execute

    @form(rf"ld\.shared(?:::cta)?{vector}\.({TYPES})", f"{values} [a]", SECTION + "ld")
    def load_shared(operands: Operands, count: str, kind: str) -> Execute:
        size, parts = _access(kind, count, operands[0])
        at, puts = addresses(operands[1], "u32"), [writer(part, kind) for part in parts]

        def execute(s: Threads) -> None:
            _spread_out(s, s.shared.load(s, s.numbers(), at(s), size * len(puts)), puts, kind)

        return execute

    stored = values.replace("d", "a")

    @form(rf"st\.global{CACHED}{vector}\.({TYPES})", f"[a] {stored}", SECTION + "st")
    def store_global(operands: Operands, count: str, kind: str) -> Execute:
        _, parts = _access(kind, count, operands[1])
        at, gets = addresses(operands[0], "u64"), [reader(part, kind) for part in parts]
        return lambda s: s.global_memory.store(s, s.numbers(), at(s), _together(s, gets))

    @form(rf"st\.shared(?:::cta)?{vector}\.({TYPES})", f"[a] {stored}", SECTION + "st")
    def store_shared(operands: Operands, count: str, kind: str) -> Execute:
        _, parts = _access(kind, count, operands[1])
        at, gets = addresses(operands[0], "u32"), [reader(part, kind) for part in parts]
        return lambda s: s.shared.store(s, s.numbers(), at(s), _together(s, gets))


def _spread_out(s: Threads, data: Array, puts: list[Any], kind: str) -> None:
    found = data.view(NUMBERS[kind])  # [threads, parts]
    for i, put in enumerate(puts):
        put(s, np.ascontiguousarray(found[:, i]))


def _together(s: Threads, gets: list[Read]) -> Array:
    """Numbers of every thread as [threads, bytes]."""
    return np.stack([s.spread(get(s)) for get in gets], 1).view(np.uint8)
