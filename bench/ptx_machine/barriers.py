"""Barriers of a program and of a warp, fences between proxies, and barriers in memory."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.ptx_machine.faults import Fault, Unsupported
from bench.ptx_machine.forms import Execute, Operands, form
from bench.ptx_machine.moves import addresses
from bench.ptx_machine.parse import Operand, Word
from bench.ptx_machine.registers import Array, reader, writer
from bench.ptx_machine.threads import WARP, Threads

ALL = np.uint32(0xFFFFFFFF)
SECTION = "Parallel Synchronization and Communication Instructions: "


@form(r"(?:bar\.sync|barrier\.sync(?:\.aligned)?)", "#", SECTION + "bar, barrier")
def barrier(operands: Operands) -> Execute:
    if operands[0] != Word("0"):
        raise Unsupported(f"barrier {operands[0]}")

    def execute(s: Threads) -> None:
        programs = s.wait()
        s.shared.meet(programs)
        for work in list(s.unit(MemoryBarriers).works):
            work.meet(s, programs)

    return execute


@form(r"bar\.warp\.sync", "a", SECTION + "bar.warp.sync")
def warp_barrier(operands: Operands) -> Execute:
    whole = whole_warps(operands[0])

    def execute(s: Threads) -> None:
        whole(s)
        s.shared.warps_meet(s.of(s.program)[::WARP], s.of(s.warp)[::WARP])

    return execute


def whole_warps(mask: Operand) -> Execute:
    """That all lanes of a warp reach an instruction, and that its mask leaves none out."""
    lanes = reader(mask, "u32")

    def check(s: Threads) -> None:
        s.whole()
        if (lanes(s) != ALL).any():
            raise Unsupported("some lanes of a warp")

    return check


@form(r"fence\.proxy\.async(?:\.shared::cta)?", "", SECTION + "membar, fence")
def proxy_fence(operands: Operands) -> Execute:
    return lambda s: s.shared.fence(s)


# -- barriers in shared memory -----------------------------------------------------------------------------------------


@dataclass(eq=False)
class Work:
    """What a matrix unit does beside some programs, until their threads have seen that it is done.

    Attributes:
        program: [programs], those that it is for.
        rows: [programs, ...], the places in shared memory that it reads.
        columns: of tensor memory, the first that it writes and the first that it does not.
        halves: 0 and 1 for the lower and upper 16 of every 32 lanes, as far as it writes them.
        seen: [programs, threads]
    """

    program: Array
    rows: list[Array]
    columns: tuple[int, int]
    halves: tuple[int, ...]
    seen: Array

    def see(self, s: Threads, lanes: Array) -> None:
        """Some threads know that it is done."""
        at = np.full(s.programs, -1)
        at[self.program] = np.arange(len(self.program))
        of = at[s.program[lanes]]
        self._note(s, of[of >= 0], s.thread[lanes][of >= 0])

    def meet(self, s: Threads, programs: Array) -> None:
        """All threads of some programs have met: what one knows all do."""
        self._note(s, np.flatnonzero(np.isin(self.program, programs) & self.seen.any(1)), slice(None))

    def _note(self, s: Threads, of: Array, threads: Any) -> None:
        over = self.seen.all(1)
        self.seen[of, threads] = True
        if (now := self.seen.all(1) & ~over).any():
            for rows in self.rows:
                s.shared.release(rows[now])
        if self.seen.all():
            s.unit(MemoryBarriers).works.discard(self)


class MemoryBarriers:
    """By address, for every program: the phase, arrivals that it takes (-1: there is no barrier), and awaited ones.

    Attributes:
        works: under way, as far as some thread knows.
        stand_for: by address, works of which an arrival says that they are done, its programs, and their phases.
    """

    def __init__(self, s: Threads) -> None:
        self.phase, self.count, self.pending = dict[int, Array](), dict[int, Array](), dict[int, Array]()
        self.works = set[Work]()
        self.stand_for: dict[int, list[tuple[Work, Array, Array]]] = {}

    def check(self, address: int, program: Array) -> None:
        """That there is a barrier.

        Raises:
            Fault: there is none.
        """
        if address not in self.count or (self.count[address][program] < 0).any():
            raise Fault(f"there is no barrier at {address} of shared memory")

    def arrive(self, s: Threads, address: int, program: Array, works: Collection[Work]) -> None:
        """Once, for each of some programs, when works are done: at once, though nobody knows before a wait."""
        self.check(address, program)
        self.stand_for.setdefault(address, []).extend((work, program, self.phase[address][program]) for work in works)
        pending = self.pending[address]
        pending[program] -= 1
        ended = program[pending[program] == 0]
        self.phase[address][ended] += 1
        s.happened += 1
        pending[ended] = self.count[address][ended]

    def see(self, s: Threads, address: int, lanes: Array) -> None:
        """Some threads have found the last phase over."""
        left = []
        for work, program, phase in self.stand_for.get(address, ()):
            over = program[self.phase[address][program] > phase]
            work.see(s, lanes[np.isin(s.program[lanes], over)])
            if work in self.works:
                left.append((work, program, phase))
        self.stand_for[address] = left

    def end(self, s: Threads) -> None:
        """What is left behind is forgotten."""


def by_address(s: Threads, address: Array) -> list[tuple[int, Array]]:
    """Every address of the current threads, and which of these have it."""
    return [(int(each), np.flatnonzero(address == each)) for each in np.unique(address)]


def one_each(program: Array) -> Array:
    """Programs of threads, of which there is one each."""
    if len(np.unique(program)) != len(program):
        raise Fault("several threads of a program execute what one of them must")
    return program


@form(r"mbarrier\.init(?:\.shared(?:::cta)?)?\.b64", "[a] a", SECTION + "mbarrier.init")
def make_barrier(operands: Operands) -> Execute:
    at, count = addresses(operands[0], "u32"), reader(operands[1], "u32")

    def execute(s: Threads) -> None:
        unit, lanes, counts = s.unit(MemoryBarriers), s.numbers(), s.spread(count(s))
        for address, some in by_address(s, at(s)):
            program = one_each(s.program[lanes[some]])
            rows = s.shared.rows(program, np.full(len(some), address), 8)
            s.shared.check_write(s, lanes[some], rows, 8)
            s.shared.reserved.reshape(-1, 8 // s.shared.cell)[rows] = True
            for of in (unit.phase, unit.count, unit.pending):
                of.setdefault(address, np.full(s.programs, -1, np.int64))
            unit.phase[address][program] = 0
            unit.count[address][program] = unit.pending[address][program] = counts[some]

    return execute


@form(r"mbarrier\.inval(?:\.shared(?:::cta)?)?\.b64", "[a]", SECTION + "mbarrier.inval")
def drop_barrier(operands: Operands) -> Execute:
    at = addresses(operands[0], "u32")

    def execute(s: Threads) -> None:
        unit, lanes = s.unit(MemoryBarriers), s.numbers()
        for address, some in by_address(s, at(s)):
            program = one_each(s.program[lanes[some]])
            unit.check(address, program)
            unit.count[address][program] = -1
            rows = s.shared.rows(program, np.full(len(some), address), 8)
            s.shared.reserved.reshape(-1, 8 // s.shared.cell)[rows] = False

    return execute


@form(r"mbarrier\.try_wait\.parity(?:\.shared(?:::cta)?)?\.b64", "d [a] a", SECTION + "mbarrier.test_wait, try_wait")
def try_wait(operands: Operands) -> Execute:
    """Whether the phase of a parity is over; whoever sees that it is sees what its arrivals stand for."""
    put, at, parity = writer(operands[0], "pred"), addresses(operands[1], "u32"), reader(operands[2], "u32")

    def execute(s: Threads) -> None:
        unit, lanes, parities = s.unit(MemoryBarriers), s.numbers(), s.spread(parity(s))
        over = np.zeros(len(lanes), bool)
        for address, some in by_address(s, at(s)):
            program = s.program[lanes[some]]
            unit.check(address, program)
            over[some] = unit.phase[address][program] & 1 != parities[some] & 1
            done = some[over[some]]
            unit.see(s, address, lanes[done])
        put(s, over)
        s.spinning[lanes[~over]] = True

    return execute
