"""What a launch asked of a GPU's units, counted while it was executed.

A request is one access of a warp. Of global memory it takes as many sectors, of 32 bytes, and lines, of 128, as its
lanes touch. Shared memory has 32 banks of 4 bytes, and serves a request in phases, each of as many lanes as ask for 128
bytes; a phase takes a wavefront for each word of the bank of which it wants most, so one where there is no conflict.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import astuple, dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np

from bench.ptx_machine.registers import Array

SECTOR, LINE = 32, 128  # bytes of global memory that move together, and that are found together
BANKS, WORD = 32, 4
WARP = 32
Sum = TypeVar("Sum", "Requests", "Wavefronts")


@dataclass
class Requests:
    """Of global memory: how many, bytes of all threads, with repetition, sectors and lines."""

    requests: int = 0
    bytes: int = 0
    sectors: int = 0
    lines: int = 0


@dataclass
class Wavefronts:
    """Of shared memory: requests, the wavefronts that they take, and that they would take without conflicts."""

    requests: int = 0
    wavefronts: int = 0
    ideal: int = 0


@dataclass
class Execution:
    """What a launch did.

    Attributes:
        programs: of its grid.
        warps: of all of them.
        instructions: how many warps executed each opcode, and some of whose threads.
        requests: of global memory, by opcode and the name of a region.
        wavefronts: of shared memory, by opcode.
        flops: of matrix instructions, 2 to a multiply-add.
        notes: what is not as the PTX ISA has it, in what Triton writes, and how often.
        opcode: of the instruction that is executed now.
    """

    kernel: str
    programs: int
    warps: int
    instructions: Counter[str] = field(default_factory=Counter)
    requests: dict[tuple[str, Any], Requests] = field(default_factory=lambda: defaultdict(Requests))
    wavefronts: dict[str, Wavefronts] = field(default_factory=lambda: defaultdict(Wavefronts))
    flops: int = 0
    notes: Counter[str] = field(default_factory=Counter)
    opcode: str = ""

    @property
    def loaded(self) -> Counter[Any]:
        """Bytes of global memory, with repetition, by the name of a region."""
        return self._bytes(stored=False)

    @property
    def stored(self) -> Counter[Any]:
        return self._bytes(stored=True)

    def _bytes(self, stored: bool) -> Counter[Any]:
        found = Counter[Any]()
        for (opcode, name), some in self.requests.items():
            if opcode.startswith("st.") == stored:
                found[name] += some.bytes
        return found

    def units(self) -> dict[str, int]:
        """Instructions of warps, by the unit that takes them."""
        found = dict.fromkeys(UNITS, 0)
        for opcode, count in self.instructions.items():
            found[unit(opcode)] += count
        return found

    # -- while it runs -------------------------------------------------------------------------------------------------

    def request(self, threads: Array, address: Array, size: int, name: Any) -> None:
        """Threads touch so many bytes each of a region."""
        warp = threads.astype(np.int64) // WARP << 44  # above what an address has in sectors
        sectors = np.sort(warp | address // SECTOR)
        warps, lines = (_distinct(sectors >> bits) for bits in (44, (LINE // SECTOR).bit_length() - 1))
        add(self.requests[self.opcode, name], Requests(warps, len(threads) * size, _distinct(sectors), lines))

    def conflict(self, threads: Array, address: Array, size: int) -> None:
        """Threads touch so many bytes each of shared memory: a piece, in as many banks as it has words."""
        size = max(size, WORD)
        phases, pieces = size // WORD, BANKS * WORD // size  # of a warp; of a row of all banks
        phase = (threads.astype(np.int64) - threads[0] // WARP * WARP) // pieces
        touched = np.sort(phase << 32 | address.astype(np.int64) // size)
        touched = touched[np.append(True, touched[1:] != touched[:-1])]
        wanted = np.bincount((touched >> 32) * pieces + touched % pieces)
        wanted.resize(-(-wanted.size // (phases * pieces)), phases, pieces)  # [warps, phases, pieces of a row]
        most = wanted.max(2)
        counted = most.any(1).sum(), most.sum(), np.count_nonzero(most)
        add(self.wavefronts[self.opcode], Wavefronts(*map(int, counted)))

    def multiply(self, matrices: int, rows: int, columns: int, depth: int) -> None:
        """Matrices are multiplied."""
        self.flops += 2 * matrices * rows * columns * depth


def add(to: Sum, more: Sum) -> None:
    """Counts are added to others of their kind."""
    for name, n, m in zip(vars(to), astuple(to), astuple(more), strict=True):
        setattr(to, name, n + m)


def total(some: Any, of: type[Sum]) -> Sum:
    """The sum of counts of a kind."""
    found = of()
    for each in some:
        add(found, each)
    return found


def _distinct(ordered: Array) -> int:
    """How many different numbers there are."""
    return 1 + int(np.count_nonzero(ordered[1:] != ordered[:-1]))


# -- units -------------------------------------------------------------------------------------------------------------

UNITS = {  # as `bench.tiles.assembly` names those of machine code, by what opcodes of PTX begin with
    "matrix": r"mma\.|wgmma\.mma_async|tcgen05\.mma",
    "special": r"(ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh)\.|div\.(full|approx|rn)\.",
    "fma": r"(add|sub|mul|fma|mad)\.(?:\w+\.)*b?f(16|32|64)|(mul|mad)\.(lo|hi|wide)\.",
    "shared": r"(ld|st)\.shared|(ld|st)matrix\.|shfl\.|redux\.|tcgen05\.(ld|st|cp)\.",
    "global": r"(ld|st)\.global|cp\.async\.c[ag]\.",
    "control": r"bra|ret|exit|bar|elect|vote|mbarrier|fence|cp\.async\.|wgmma\.|tcgen05\.|ld\.param|griddepcontrol",
    "alu": "",
}


@cache
def unit(opcode: str) -> str:
    """Which of `UNITS` takes an instruction: "alu" those that no other does."""
    return next(name for name, pattern in UNITS.items() if re.match(pattern, opcode))
