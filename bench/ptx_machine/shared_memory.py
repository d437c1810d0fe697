"""Shared memory, and its watch (PTX ISA: Memory Consistency Model; Async Proxy).

Each cell, as many bytes as the kernel's smallest access has, knows which thread wrote it last, which have read it since
all threads last met, and when. A thread sees what another one wrote only behind a barrier: `bar.sync` for those of a
program, `bar.warp.sync` for those of a warp. Lanes run together here, and on a GPU in any order; asking for the barrier
covers all orders at once, and needs no luck.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bench.ptx_machine.counts import WARP, Execution
from bench.ptx_machine.faults import Fault
from bench.ptx_machine.registers import Array

if TYPE_CHECKING:
    from bench.ptx_machine.parse import Module
    from bench.ptx_machine.threads import Threads

LARGEST = 16  # bytes of an access
MOST = 1 << 14  # more threads than a program has
BY_THREADS, BY_COPIES = 1, 2
NO_FENCE = "copies that a matrix unit reads without a proxy fence between"
BEGIN = 2  # of time: what was never is at 0, and at 1 is what no thread did


def smallest_access(module: Module) -> int:
    """Bytes of the smallest access to shared memory in a kernel."""
    sizes = [LARGEST]
    for instruction in module.instructions:
        parts = instruction.opcode.split(".")
        if parts[0] in ("ld", "st") and any(part.startswith("shared") for part in parts):
            count = next((int(part[1:]) for part in parts if part in ("v2", "v4", "v8")), 1)
            sizes.append(int(parts[-1][1:]) // 8 * count)
        elif parts[:2] == ["cp", "async"] and len(instruction.operands) > 2:
            sizes.append(int(getattr(instruction.operands[2], "text", "16"), 0))
        elif parts[0] in ("mbarrier", "tcgen05"):
            sizes.append(8 if parts[0] == "mbarrier" else 4)
    return min(sizes)


class SharedMemory:
    """A row of memory for each program, and a clock, which goes on at every barrier.

    Attributes:
        now: the time of each program.
        met: when all threads of each last met.
        warp_met: when those of each warp last did.
        reserved: cells that belong to a barrier in memory.
        unfenced: cells that matrix units do not see yet: written by threads, `BY_THREADS`, or copied, `BY_COPIES`.
        flying: copies under way to a cell.
        busy: matrix instructions under way that read a cell.
        done: what is counted, and noted of what is not as the PTX ISA has it, in what Triton writes.
    """

    def __init__(self, programs: int, threads: int, size: int, module: Module, done: Execution) -> None:
        self.size, self.pitch, self.threads = size, max(1, -(-size // LARGEST)) * LARGEST, threads
        self.cell = smallest_access(module)
        self.data = np.zeros(programs * self.pitch, np.uint8)
        cells = programs * self.pitch // self.cell
        self.wrote_at, self.read_at = np.zeros((2, cells), np.int32)
        self.writer, self.first_reader, self.last_reader = np.zeros((3, cells), np.int16)
        self.flying, self.busy = np.zeros((2, cells), np.int16)
        self.unfenced, self.reserved = np.zeros(cells, np.int8), np.zeros(cells, bool)
        self.done = done
        self.now, self.met = np.full((2, programs), BEGIN, np.int32)
        self.warp_met = np.full((programs, -(-threads // WARP)), BEGIN, np.int32)

    # -- places --------------------------------------------------------------------------------------------------------

    def rows(self, program: Array, address: Array, size: int) -> Array:
        """Where pieces of `size` bytes lie, by their number among such."""
        address = address.astype(np.int64)
        if address.size and int(address.max()) + size > self.size:
            raise Fault(f"shared memory: out of bounds, byte {int(address.max()) + size} of {self.size}")
        if (address % size).any():
            raise Fault(f"shared memory: misaligned for {size} bytes")
        return (program * self.pitch + address) // size

    def cells(self, of: Array, rows: Array, size: int) -> Array:
        """[..., cells] of what is known of pieces."""
        return of.reshape(-1, size // self.cell)[rows]

    def bytes(self, rows: Array, size: int) -> Array:
        """[..., size] bytes of pieces."""
        return self.data.reshape(-1, size)[rows]

    # -- time ----------------------------------------------------------------------------------------------------------

    def meet(self, programs: Array) -> None:
        """All threads of some programs have met."""
        self.now[programs] += 1
        self.met[programs] = self.now[programs]

    def warps_meet(self, program: Array, warp: Array) -> None:
        """All threads of some warps have met."""
        self.now[np.unique(program)] += 1
        self.warp_met[program, warp] = self.now[program]

    def _own(self, s: Threads, lanes: Array, then: Array, first: Array, last: Array) -> Array:
        """Whether threads `first` to `last` were the current thread alone, or met it in its warp since then."""
        me, warp = s.thread[lanes][:, None], s.warp[lanes]
        met = self.warp_met[s.program[lanes], warp][:, None]
        of_warp = (first >> 5 == warp[:, None]) & (last >> 5 == warp[:, None])
        return ((first == me) & (last == me)) | (of_warp & (then < met))

    # -- accesses of threads -------------------------------------------------------------------------------------------

    def load(self, s: Threads, lanes: Array, address: Array, size: int) -> Array:
        """[threads, size] bytes that threads read."""
        program = s.program[lanes]
        rows, met = self.rows(program, address, size), self.met[program][:, None]
        if self.cells(self.reserved, rows, size).any():
            raise Fault("shared memory: a barrier is read")
        if self.cells(self.flying, rows, size).any():
            raise Fault("shared memory: read while a copy to it is under way")
        then = self.cells(self.wrote_at, rows, size)
        if not then.all():
            raise Fault("shared memory: read before it is written")
        if (recent := then >= met).any():
            writer = self.cells(self.writer, rows, size)
            if (recent & ~self._own(s, lanes, then, writer, writer)).any():
                raise Fault("shared memory: read what another thread writes, without a barrier")
        self._note_readers(s, lanes, rows, size, met)
        self.done.conflict(lanes, address, size)
        return self.bytes(rows, size)

    def _note_readers(self, s: Threads, lanes: Array, rows: Array, size: int, met: Array) -> None:
        count = size // self.cell
        cells = rows[:, None] * count + np.arange(count)
        fresh = cells[self.read_at[cells] < met]
        self.first_reader[fresh], self.last_reader[fresh] = MOST, -1
        me = np.broadcast_to(s.thread[lanes].astype(np.int16)[:, None], cells.shape).reshape(-1)
        np.minimum.at(self.first_reader, cells.reshape(-1), me)
        np.maximum.at(self.last_reader, cells.reshape(-1), me)
        self.read_at[cells] = self.now[s.program[lanes]][:, None]

    def store(self, s: Threads, lanes: Array, address: Array, data: Array) -> None:
        """[threads, size] bytes that threads write."""
        rows = self.rows(s.program[lanes], address, data.shape[1])
        self.check_write(s, lanes, rows, data.shape[1], data)
        self.put(s, lanes, rows, data)

    def check_write(self, s: Threads, lanes: Array, rows: Array, size: int, data: Array | None = None) -> None:
        """That nobody else uses what threads are about to write, or that it holds these bytes already."""
        self.done.conflict(lanes, rows * size, size)  # where a program's row begins moves all banks alike
        if self.cells(self.reserved, rows, size).any():
            raise Fault("shared memory: a barrier is overwritten")
        if self.cells(self.flying, rows, size).any():
            raise Fault("shared memory: written while a copy to it is under way")
        if self.cells(self.busy, rows, size).any():
            raise Fault("shared memory: overwritten while a matrix instruction may read it")
        met = self.met[s.program[lanes]][:, None]
        then = self.cells(self.read_at, rows, size)
        if (recent := then >= met).any():
            readers = (self.cells(of, rows, size) for of in (self.first_reader, self.last_reader))
            if (recent & ~self._own(s, lanes, then, *readers)).any():
                raise Fault("shared memory: overwritten what another thread reads, without a barrier")
        then = self.cells(self.wrote_at, rows, size)
        if (recent := then >= met).any():
            writer = self.cells(self.writer, rows, size)
            others = (recent & ~self._own(s, lanes, then, writer, writer)).any(1)
            if others.any() and (data is None or (self.bytes(rows, size) != data)[others].any()):
                raise Fault("shared memory: overwritten what another thread writes, without a barrier")

    def put(self, s: Threads, lanes: Array, rows: Array, data: Array, how: int = BY_THREADS) -> None:
        """Bytes at places that were found free."""
        size = data.shape[1]
        held, count = self.data.reshape(-1, size), size // self.cell
        held[rows] = data
        if (held[rows] != data).any():
            raise Fault("shared memory: two threads write different numbers to one place")
        self.wrote_at.reshape(-1, count)[rows] = self.now[s.program[lanes]][:, None]
        self.writer.reshape(-1, count)[rows] = s.thread[lanes][:, None]
        self.unfenced.reshape(-1, count)[rows] = how

    # -- accesses of matrix units --------------------------------------------------------------------------------------

    def load_by_unit(self, program: Array, address: Array) -> tuple[Array, Array]:
        """[..., 16] bytes that a matrix unit reads for programs, and their places: busy until `release`.

        What threads wrote must lie behind a barrier and a proxy fence. So must what they copied, by the PTX ISA; but
        Triton leaves that fence out at times, or has it before the wait, which is noted.
        """
        rows = self.rows(program, address, LARGEST)
        then, met = self.cells(self.wrote_at, rows, LARGEST), self.met
        if self.threads == WARP:
            met = np.maximum(met, self.warp_met[:, 0])
        if self.cells(self.flying, rows, LARGEST).any():
            raise Fault("shared memory: read by a matrix unit while a copy to it is under way")
        if not then.all():
            raise Fault("shared memory: read by a matrix unit before it is written")
        if (unfenced := self.cells(self.unfenced, rows, LARGEST)).any():
            if (unfenced == BY_THREADS).any():
                raise Fault("shared memory: no proxy fence between a write and a matrix unit's read")
            self.done.notes[NO_FENCE] += 1
        if (then >= np.broadcast_to(met[program], rows.shape)[..., None]).any():
            raise Fault("shared memory: no barrier between a write and a matrix unit's read")
        np.add.at(self.busy.reshape(-1, LARGEST // self.cell), rows.reshape(-1), 1)
        return self.bytes(rows, LARGEST), rows

    def release(self, rows: Array) -> None:
        """What `load_by_unit` reads is read."""
        np.subtract.at(self.busy.reshape(-1, LARGEST // self.cell), rows.reshape(-1), 1)

    def read_by_warp_groups(self, first: Array, program: Array, rows: Array) -> None:
        """What warp groups have read and waited for, each of their warps for its own part of the product."""
        count = LARGEST // self.cell
        cells = (rows.reshape(len(rows), -1, 1) * count + np.arange(count)).reshape(len(rows), -1)
        for thread, of, some in zip(first, program, cells, strict=True):
            fresh = some[self.read_at[some] < self.met[of]]
            self.first_reader[fresh], self.last_reader[fresh] = MOST, -1
            self.first_reader[some] = np.minimum(self.first_reader[some], thread)
            self.last_reader[some] = np.maximum(self.last_reader[some], thread + 127)
            self.read_at[some] = self.now[of]

    def fence(self, s: Threads) -> None:
        """Matrix units see what the current threads wrote, and what others wrote before all threads last met."""
        on = np.zeros((s.programs, s.threads), bool)
        on.reshape(-1)[s.lanes] = True
        for program in np.flatnonzero(on.any(1)):
            here = slice(program * self.pitch // self.cell, (program + 1) * self.pitch // self.cell)
            seen = on[program][self.writer[here]] | (self.wrote_at[here] < self.met[program])
            self.unfenced[here][seen] = 0
