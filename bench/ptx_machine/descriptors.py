"""Matrices in shared memory as matrix units find them (PTX ISA: Matrix Descriptor Format; Shared Memory Descriptor;
Canonical Layouts; Swizzling Modes).

A matrix has rows of the product's (or its columns) along one axis and the depth of the sum along the other; either may
be the one along memory. Memory is cut into atoms of 8 lines, a line being 16, 32, 64 or 128 bytes, and the 16-byte
pieces of wider lines change places within each 128 bytes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from bench.ptx_machine.faults import Unsupported
from bench.ptx_machine.registers import Array, numbers
from bench.ptx_machine.threads import Threads

PIECE, CORE = 16, 8  # bytes, and lines that are read at once


class Fields(NamedTuple):
    """Where a descriptor says how lines lie: the lowest bit, bytes of a line by its number, and bits that must hold."""

    swizzle: int
    lines: dict[int, int]
    must: tuple[int, int]  # a mask, and the bits under it


WARP_GROUPS = Fields(62, {0: 16, 1: 128, 2: 64, 3: 32}, (7 << 49, 0))
TENSOR_CORES = Fields(61, {0: 16, 2: 128, 4: 64, 6: 32}, (7 << 49 | 1 << 52 | 7 << 46, 1 << 46))


def matrix(
    s: Threads, program: Array, descriptor: Array, fields: Fields, kind: str, shape: tuple[int, int], turned: bool
) -> tuple[Array, Array]:
    """[programs, rows, depth] in fp64, and the places in shared memory that hold it, which are busy now.

    Args:
        program: of each descriptor.
        kind: of the elements: f16, bf16 or tf32.
        shape: rows and depth.
        turned: rows are along memory, and not the depth.
    """
    mask, bits = (np.uint64(x) for x in fields.must)
    modes = np.unique(descriptor >> np.uint64(fields.swizzle))
    if ((descriptor & mask) != bits).any() or len(modes) != 1 or int(modes[0]) not in fields.lines:
        raise Unsupported(f"a matrix descriptor {int(descriptor[0]):#x}")
    line, (rows, depth), size = fields.lines[int(modes[0])], shape, 4 if kind == "tf32" else 2
    if turned and size == 4:
        raise Unsupported(f"{kind} with rows along memory")

    def part(low: int) -> Array:
        return ((descriptor >> np.uint64(low)) & np.uint64(0x3FFF)).astype(np.int64)[:, None, None] * PIECE

    start, leading, stride = part(0), part(16), part(32)
    pieces = (rows if turned else depth) * size // PIECE  # along memory
    across, along = np.arange(depth if turned else rows)[:, None], np.arange(pieces)[None, :]
    if line == PIECE:  # an atom of 8 lines is whole; the next ones are at strides
        outer, inner = (leading, stride) if turned else (stride, leading)
        address = start + across // 8 * outer + across % 8 * PIECE + along * inner
    else:
        along = along * PIECE
        address = start + across // 8 * stride + across % 8 * line + along // line * leading + along % line
        address ^= (address >> 3) & (line - PIECE)
    cores = address.reshape(len(address), -1, CORE, pieces).swapaxes(2, 3)  # matrices that are read at once: phases
    s.done.conflict(np.arange(cores.size), cores.reshape(-1), PIECE)
    held, places = s.shared.load_by_unit(program[:, None, None], address)  # [programs, across, pieces, 16]
    bits_of = held.reshape(*held.shape[:2], -1).view(np.uint32 if size == 4 else np.uint16)
    found = numbers(bits_of, kind).astype(np.float64)
    return found.swapaxes(1, 2) if turned else found, places
