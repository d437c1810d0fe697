"""Asynchronous copies from global to shared memory (PTX ISA: Non-bulk copy).

What is copied is there for a thread behind its wait, and for others behind a barrier after that. Until then the bytes
may not be touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.ptx_machine.faults import Fault
from bench.ptx_machine.forms import Execute, Operands, form
from bench.ptx_machine.moves import addresses
from bench.ptx_machine.registers import Array, Read, reader
from bench.ptx_machine.shared_memory import BY_COPIES
from bench.ptx_machine.threads import Threads

SECTION = "Data Movement and Conversion Instructions: Asynchronous copy: "
COPY = r"cp\.async\.(?:ca|cg)\.shared(?:::cta)?\.global(?:\.L2::(?:64|128|256)B)?"


@dataclass
class Copy:
    """One of each of some threads: the thread, its group of copies, where it goes, and what is copied."""

    lanes: Array
    group: Array
    rows: Array
    data: Array


class Copies:
    """Those under way, and how many groups each thread has committed."""

    def __init__(self, s: Threads) -> None:
        self.committed, self.flying = np.zeros(s.n, np.int64), list[Copy]()

    def end(self, s: Threads) -> None:
        """Copies that nobody waits for end with their programs."""


@form(COPY, "[a] [a] #", SECTION + "cp.async")
def copy_all(operands: Operands) -> Execute:
    size = int(operands[2].text, 0)
    return _copy(operands, size, None)


@form(COPY, "[a] [a] # a", SECTION + "cp.async")
def copy_or_zero(operands: Operands) -> Execute:
    size = int(operands[2].text, 0)
    return _copy(operands, size, reader(operands[3], "u32"))


def _copy(operands: Operands, size: int, read: Read | None) -> Execute:
    """`size` bytes, of which `read` are read and the others are zero."""
    to, source = addresses(operands[0], "u32"), addresses(operands[1], "u64")

    def execute(s: Threads) -> None:
        unit, lanes = s.unit(Copies), s.numbers()
        data, start = np.zeros((len(lanes), size), np.uint8), source(s)
        count = np.full(len(lanes), size) if read is None else s.spread(read(s))
        if (count > size).any():
            raise Fault(f"a copy of more than its {size} bytes")
        for part in np.unique(count[count > 0]):
            some = count == part
            whole = s.global_memory.load(s, lanes[some], start[some], int(part))
            data[some, : int(part)] = whole
        rows = s.shared.rows(s.program[lanes], to(s), size)
        s.shared.check_write(s, lanes, rows, size)
        cells = s.shared.flying.reshape(-1, size // s.shared.cell)
        cells[rows] += 1
        if len(np.unique(rows)) != len(rows):
            raise Fault("shared memory: two copies at once to one place")
        unit.flying.append(Copy(lanes, unit.committed[lanes], rows, data))

    return execute


@form(r"cp\.async\.commit_group", "", SECTION + "cp.async.commit_group")
def commit(operands: Operands) -> Execute:
    def execute(s: Threads) -> None:
        s.unit(Copies).committed[s.lanes] += 1

    return execute


@form(r"cp\.async\.wait_group", "#", SECTION + "cp.async.wait_group")
def wait(operands: Operands) -> Execute:
    return _wait(int(operands[0].text, 0))


@form(r"cp\.async\.wait_all", "", SECTION + "cp.async.wait_all")
def wait_all(operands: Operands) -> Execute:
    return _wait(-1)


def _wait(newest: int) -> Execute:
    """Until at most so many of the newest groups are under way; -1: nor what is in no group yet."""

    def execute(s: Threads) -> None:
        unit = s.unit(Copies)
        waits, left = np.zeros(s.n, bool), list[Copy]()
        waits[s.lanes] = True
        for copy in unit.flying:
            done = waits[copy.lanes] & (copy.group < unit.committed[copy.lanes] - newest)
            if done.any():
                rows, data = copy.rows[done], copy.data[done]
                s.shared.flying.reshape(-1, data.shape[1] // s.shared.cell)[rows] -= 1
                s.shared.put(s, copy.lanes[done], rows, data, BY_COPIES)
            if not done.all():
                left.append(Copy(*(x[~done] for x in (copy.lanes, copy.group, copy.rows, copy.data))))
        unit.flying = left

    return execute
