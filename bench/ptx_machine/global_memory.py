"""Global memory: the tensors of a launch, and what a GPU would not notice.

A byte may be touched only where a tensor has an element. What one program writes no other may read or write in the same
launch, nor another thread of the program without a barrier between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bench.ptx_machine.counts import Execution
from bench.ptx_machine.faults import Fault
from bench.ptx_machine.registers import Array

if TYPE_CHECKING:
    from bench.ptx_machine.threads import Threads

ALIGNED = 256  # bytes that divide where a tensor's copy here begins, as they divide what an allocator gives
NONE, SEVERAL, FIRST = 0, -1, 1  # programs that have touched a byte: none, several, and the first of all


class Region(NamedTuple):
    """Memory of a tensor: its address, its bytes, which of them are elements, and what it is called."""

    start: int
    data: Array
    exists: Array
    name: Any


class GlobalMemory:
    """Copies of regions, one behind the other; what nobody touches of the watch takes no memory."""

    def __init__(self, regions: list[Region], done: Execution) -> None:
        self.regions = sorted(regions, key=lambda region: region.start)
        self.starts = np.array([region.start for region in self.regions], np.int64)
        self.ends = self.starts + [region.data.size for region in self.regions]
        phases = [region.start % ALIGNED for region in self.regions]
        sizes = [-(-(phase + region.data.size) // ALIGNED) * ALIGNED
                 for phase, region in zip(phases, self.regions, strict=True)]  # fmt: skip
        self.bases = np.cumsum([0, *sizes[:-1]]) + phases if self.regions else np.zeros(0, np.int64)
        total = sum(sizes)
        self.data, self.exists = np.zeros(total, np.uint8), np.zeros(total, bool)
        self.writer, self.reader = np.zeros(total, np.int32), np.zeros(total, np.int32)
        self.stamp = np.zeros(total, np.int64)  # who wrote it, and when its program's threads had last met
        for base, region in zip(self.bases, self.regions, strict=True):
            self.data[base : base + region.data.size] = region.data
            self.exists[base : base + region.data.size] = region.exists
        self.done = done

    def write_back(self) -> None:
        """The tensors hold what was stored."""
        for base, region in zip(self.bases, self.regions, strict=True):
            region.data[:] = self.data[base : base + region.data.size]

    def load(self, s: Threads, lanes: Array, address: Array, size: int) -> Array:
        """[threads, size] bytes."""
        rows = self._rows(lanes, address, size)
        program = self._program(s, lanes)
        writer = self.writer.reshape(-1, size)[rows]
        written = writer != NONE
        if written.any():
            self._check(s, lanes, rows, size, written & (writer != program), written)
        readers = self.reader.reshape(-1, size)
        before = readers[rows]
        readers[rows] = program
        several = (before != NONE) & (before != program) | (readers[rows] != program)
        if several.any():
            readers[rows] = np.where(several, SEVERAL, readers[rows])
        return self.data.reshape(-1, size)[rows]

    def store(self, s: Threads, lanes: Array, address: Array, data: Array) -> None:
        """[threads, size] bytes."""
        size = data.shape[1]
        rows = self._rows(lanes, address, size)
        program = self._program(s, lanes)
        writers, readers = self.writer.reshape(-1, size), self.reader.reshape(-1, size)[rows]
        before = writers[rows]
        if ((before != NONE) & (before != program)).any() or ((readers != NONE) & (readers != program)).any():
            raise Fault("global memory: a program writes what another one of the launch reads or writes")
        held = self.data.reshape(-1, size)
        same = (held[rows] == data).all()
        if not same and (before != NONE).any():
            self._check(s, lanes, rows, size, np.zeros_like(before, bool), before != NONE)
        held[rows], writers[rows] = data, program
        self.stamp.reshape(-1, size)[rows] = self._stamp(s, lanes)
        if (held[rows] != data).any() or (writers[rows] != program).any():
            raise Fault("global memory: two threads write one place at once")

    def _program(self, s: Threads, lanes: Array) -> Array:
        return (s.first + s.program[lanes] + FIRST)[:, None].astype(np.int32)

    def _stamp(self, s: Threads, lanes: Array) -> Array:
        return (s.shared.met[s.program[lanes]].astype(np.int64) * s.threads + s.thread[lanes])[:, None]

    def _check(self, s: Threads, lanes: Array, rows: Array, size: int, others: Array, own: Array) -> None:
        """What was written before is of the same thread, or there has been a barrier."""
        if others.any():
            raise Fault("global memory: a program reads what another one of the launch writes")
        stamp, mine = self.stamp.reshape(-1, size)[rows], self._stamp(s, lanes)
        if (own & (stamp // s.threads == mine // s.threads) & (stamp != mine)).any():
            raise Fault("global memory: touched where another thread writes, without a barrier")

    def _rows(self, lanes: Array, address: Array, size: int) -> Array:
        """Where elements lie, by their number among elements of one size."""
        address = address.view(np.int64)
        if (address % size).any():
            raise Fault(f"global memory: misaligned for {size} bytes")
        if not len(self.regions) and len(address):
            raise Fault("global memory: outside every tensor")
        which = np.maximum(np.searchsorted(self.starts, address, "right") - 1, 0)
        if ((address < self.starts[which]) | (address + size > self.ends[which])).any():
            raise Fault("global memory: outside every tensor")
        rows = (address - self.starts[which] + self.bases[which]) // size
        if not self.exists.reshape(-1, size)[rows].all():
            raise Fault("global memory: outside every tensor")
        for region in np.unique(which):
            here = which == region
            self.done.request(lanes[here], address[here], size, self.regions[region].name)
        return rows
