"""The state of some programs of a grid, all of whose threads run together."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.ptx_machine.counts import WARP, Execution
from bench.ptx_machine.faults import Fault, Unsupported
from bench.ptx_machine.global_memory import GlobalMemory
from bench.ptx_machine.parse import Module
from bench.ptx_machine.registers import STORED, Array
from bench.ptx_machine.shared_memory import SharedMemory

WARP_GROUP = 128
EVERY = slice(None)
LANE = np.arange(WARP)


class Threads:
    """Registers, and the memory that threads see.

    Attributes:
        lanes: the threads that the current instruction is for.
        on: which have not ended.
        pc: the number of the instruction where each is.
        waiting: at a barrier, until all threads of its program are.
        spinning: for a barrier in memory, until something has happened.
        happened: how often a barrier has let somebody go on.
        program, thread, warp: of every thread, among the programs here and within its own.
        global_memory: of all programs of the launch.
        shared: a row for each program.
        done: what is counted of them.
        units: what instructions keep from one to the next: copies, matrix products, barriers under way.
    """

    def __init__(
        self, module: Module, programs: Array, grid: tuple[int, ...], shared: int, parameters: bytes,
        memory: GlobalMemory, done: Execution,
    ) -> None:  # fmt: skip
        count, threads = len(programs), module.threads
        self.n, self.threads, self.programs = count * threads, threads, count
        self.program, self.thread = np.repeat(np.arange(count), threads), np.tile(np.arange(threads), count)
        self.warp = self.thread // WARP
        self.lanes: Any = EVERY
        self.pc, self.on = np.zeros(self.n, np.int64), np.ones(self.n, bool)
        self.waiting, self.spinning = np.zeros((2, self.n), bool)
        self.happened = 0
        self.registers = {width: np.zeros((n, self.n), STORED[width]) for width, n in module.registers.items()}
        self.parameters, self.module, self.done = parameters, module, done
        self.global_memory, self.first = memory, int(programs[0] @ _pitches(grid))
        self.shared = SharedMemory(count, threads, shared, module, done)
        self.units: dict[type, Any] = {}
        self._special = {"%tid.x": self.thread}
        for axis, name in enumerate("xyz"):
            self._special[f"%ctaid.{name}"] = np.repeat(programs[:, axis], threads)
            self._special[f"%nctaid.{name}"] = np.full(self.n, grid[axis])

    def special(self, name: str) -> Array:
        """A special register (PTX ISA: Special Registers)."""
        if name not in self._special:
            raise Unsupported(f"the special register {name}")
        return self._special[name]

    def unit(self, kind: type) -> Any:
        """What instructions of one kind keep, made when the first of them asks."""
        if kind not in self.units:
            self.units[kind] = kind(self)
        return self.units[kind]

    def of(self, x: Array) -> Array:
        """Of all threads, those that the current instruction is for."""
        return x[self.lanes]

    def numbers(self) -> Array:
        """Which threads the current instruction is for."""
        return np.arange(self.n)[self.lanes]

    def spread(self, x: Array) -> Array:
        """One number a thread, where there may be one for all."""
        count = self.n if self.lanes is EVERY else len(self.lanes)
        return x if len(x) == count else np.broadcast_to(x, (count,))

    def wait(self) -> Array:
        """The current threads wait for the others of their programs; the programs whose threads are all there go on."""
        self.waiting[self.lanes] = True
        met = self.waiting.reshape(self.programs, -1).all(1)
        if met.any():
            self.waiting &= ~np.repeat(met, self.threads)
            self.happened += 1
        return np.flatnonzero(met)

    def whole(self, together: int = WARP) -> int:
        """How many warps, or warp groups, the current instruction is for.

        Raises:
            Fault: not all threads of one reach it.
        """
        if self.lanes is EVERY and self.threads % together == 0:
            return self.n // together
        lanes = self.numbers()
        first = lanes[::together]
        if (
            len(lanes) % together
            or (first % together).any()
            or (lanes != np.repeat(first, together) + np.arange(len(lanes)) % together).any()
        ):
            what = "warp" if together == WARP else "warp group"
            raise Fault(f"not all threads of a {what} reach an instruction that is for all of them")
        return len(first)

    def by_warp(self, x: Array) -> Array:
        """One number a thread as [warps, 32]."""
        return self.spread(x).reshape(-1, WARP)


def _pitches(grid: tuple[int, ...]) -> Array:
    return np.array([grid[1] * grid[2], grid[2], 1])
