"""Matrices of a warp: ldmatrix, stmatrix and mma.sync.

Of a fragment of 8 rows of 32 bits each lane has one number of 32 bits: lane 4 * row + column.
"""

from __future__ import annotations

import numpy as np

from bench.ptx_machine.faults import Unsupported
from bench.ptx_machine.forms import Execute, Operands, form
from bench.ptx_machine.moves import addresses
from bench.ptx_machine.parse import Operand, Register, Vector, Word
from bench.ptx_machine.registers import Array, Read, numbers, reader, writer
from bench.ptx_machine.threads import LANE, WARP, Threads

ROW, COLUMN = LANE // 4, LANE % 4  # of a lane in a fragment
SECTION = "Warp Level Matrix Instructions: "
ONE, PARTS = r"\.x1", r"\.x(2|4)"


def parts_of(operand: Operand, count: int) -> tuple[Register | Word, ...]:
    """A vector's parts, of which there must be so many."""
    parts = operand.parts if isinstance(operand, Vector) else (operand,)
    if len(parts) != count:
        raise Unsupported(f"{len(parts)} registers in the place of {count}")
    return parts  # type: ignore[return-value]


def _rows_of(s: Threads, address: Array, count: int) -> tuple[Array, Array]:
    """The threads that say where the rows of `count` matrices are, and where."""
    warps = s.whole()
    lanes = s.numbers().reshape(warps, WARP)[:, : 8 * count].reshape(-1)
    return lanes, address.reshape(warps, WARP)[:, : 8 * count].reshape(-1)


@form(r"ldmatrix\.sync\.aligned\.m8n8\.x(1|2|4)(\.trans)?\.shared(?:::cta)?\.b16", "{}|a [a]", SECTION + "ldmatrix")
def load_matrices(operands: Operands, count: str, turned: str | None) -> Execute:
    puts, at = [writer(x, "b32") for x in parts_of(operands[0], int(count))], addresses(operands[1], "u32")

    def execute(s: Threads) -> None:
        lanes, address = _rows_of(s, at(s), len(puts))
        held = s.shared.load(s, lanes, address, 16).view(np.uint16).reshape(-1, len(puts), 8, 8)
        if turned:
            held = held.swapaxes(2, 3)
        pairs = np.ascontiguousarray(held).view(np.uint32)  # [warps, matrices, 8, 4]
        for i, put in enumerate(puts):
            put(s, pairs[:, i, ROW, COLUMN].reshape(-1))

    return execute


@form(r"stmatrix\.sync\.aligned\.m8n8\.x(1|2|4)(\.trans)?\.shared(?:::cta)?\.b16", "[a] {}|a", SECTION + "stmatrix")
def store_matrices(operands: Operands, count: str, turned: str | None) -> Execute:
    gets, at = [reader(x, "b32") for x in parts_of(operands[1], int(count))], addresses(operands[0], "u32")

    def execute(s: Threads) -> None:
        lanes, address = _rows_of(s, at(s), len(gets))
        pairs = np.empty((s.whole(), len(gets), 8, 4), np.uint32)
        for i, get in enumerate(gets):
            pairs[:, i, ROW, COLUMN] = s.by_warp(get(s))
        held = pairs.view(np.uint16)
        if turned:
            held = np.ascontiguousarray(held.swapaxes(2, 3))
        s.shared.store(s, lanes, address, held.reshape(-1, 8).view(np.uint8))

    return execute


# -- products ----------------------------------------------------------------------------------------------------------


def fragments(s: Threads, gets: list[Read]) -> Array:
    """[registers, warps, 8, 4] of 32 bits."""
    held = np.empty((len(gets), s.whole(), 8, 4), np.uint32)
    for i, get in enumerate(gets):
        held[i][:, ROW, COLUMN] = s.by_warp(get(s))
    return held


def left_operand(s: Threads, gets: list[Read], kind: str) -> Array:
    """[warps, 16, columns] of four registers: first down, then across."""
    found = numbers(fragments(s, gets), kind).astype(np.float64)
    return np.concatenate([np.concatenate(found[i : i + 2], 1) for i in range(0, len(gets), 2)], 2)


@form(r"mma\.sync\.aligned\.(m16n8k16)\.row\.col\.f32\.(f16|bf16)\.\2\.f32", "{} {} {} {}", SECTION + "mma")
@form(r"mma\.sync\.aligned\.(m16n8k8)\.row\.col\.f32\.(f16|bf16)\.\2\.f32", "{} {} {}|a {}", SECTION + "mma")
@form(r"mma\.sync\.aligned\.(m16n8k8|m16n8k4)\.row\.col\.f32\.(tf32)\.\2\.f32", "{} {} {}|a {}", SECTION + "mma")
def multiply(operands: Operands, shape: str, kind: str) -> Execute:
    """d = a b + c, its sums in fp64, rounded once."""
    across = int(shape.rpartition("k")[2]) // (4 if kind == "tf32" else 8)  # registers of a row
    a, b = ([reader(x, "b32") for x in parts_of(operands[i], n * across)] for i, n in ((1, 2), (2, 1)))
    puts, c = [writer(x, "f32") for x in parts_of(operands[0], 4)], [reader(x, "f32") for x in parts_of(operands[3], 4)]

    def execute(s: Threads) -> None:
        left = left_operand(s, a, kind)  # [warps, 16, k]
        right = np.concatenate(list(numbers(fragments(s, b), kind)), 2)  # [warps, 8, k]
        total = left @ right.astype(np.float64).swapaxes(1, 2)
        s.done.multiply(len(left), 16, 8, left.shape[2])
        for i, get in enumerate(c):
            total[:, ROW + i // 2 * 8, 2 * COLUMN + i % 2] += s.by_warp(get(s))
        rounded = total.astype(np.float32)
        for i, put in enumerate(puts):
            put(s, rounded[:, ROW + i // 2 * 8, 2 * COLUMN + i % 2].reshape(-1))

    return execute
