"""Control flow: kernels executed over their grid (PTX ISA: Control Flow Instructions; Predicated Execution).

Threads of some programs run in lock-step, as NumPy's arrays. Where they part, those that are furthest behind in the
text go first, so they meet again where the branches do.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from bench.ptx_machine import (
    arithmetic,
    barriers,
    conversions,
    copies,
    matrices,
    moves,
    tensor_cores,
    warp_groups,
    warps,
)
from bench.ptx_machine.counts import Execution
from bench.ptx_machine.faults import Fault, Unsupported
from bench.ptx_machine.forms import Execute, Operands, build, form
from bench.ptx_machine.global_memory import GlobalMemory, Region
from bench.ptx_machine.parse import Instruction, Module, parse
from bench.ptx_machine.threads import EVERY, WARP, Threads

INSTRUCTIONS = arithmetic, barriers, conversions, copies, matrices, moves, tensor_cores, warp_groups, warps
TOGETHER = 1 << 14  # threads that run together
SHARED = 1 << 23  # bytes of shared memory that they have at most
JUMPS = ("bra", "bra.uni", "ret", "exit", "bar.sync", "barrier.sync", "barrier.sync.aligned")  # where threads may part
PATIENCE = 1 << 20  # jumps of a program, of which none takes as many


class Step(NamedTuple):
    """An instruction, compiled."""

    instruction: Instruction
    execute: Execute
    jumps: bool


@form(r"bra(?:\.uni)?", "a", "Control Flow Instructions: bra")
def branch(operands: Operands) -> Execute:
    label = operands[0].text

    def execute(s: Threads) -> None:
        s.pc[s.lanes] = s.module.labels[label]

    return execute


@form(r"ret|exit", "", "Control Flow Instructions: ret; exit")
def end(operands: Operands) -> Execute:
    def execute(s: Threads) -> None:
        s.on[s.lanes] = False

    return execute


@lru_cache(maxsize=64)
def compiled(text: str) -> tuple[Module, tuple[Step, ...]]:
    """A kernel whose instructions are functions.

    Raises:
        Unsupported: the machine does not know one of them.
    """
    module = parse(text)
    module.in_use = warp_groups.in_use(module)
    steps = [
        Step(each, warp_groups.watched(module, each, build(each)), each.opcode in JUMPS) for each in module.instructions
    ]
    if not steps or not steps[-1].jumps or steps[-1].instruction.guard:
        raise Unsupported(f"{module.name} does not end")
    return module, tuple(steps)


def execute(text: str, grid: tuple[int, int, int], shared: int, parameters: bytes, regions: list[Region]) -> Execution:
    """Execute a kernel.

    Args:
        text: PTX.
        grid: programs along x, y and z.
        shared: bytes of a program's shared memory.
        parameters: the kernel's arguments, as they lie in memory.
        regions: the memory that it may touch; what it stores is written there.

    Raises:
        Unsupported: the machine does not know an instruction.
        Fault: something is not as a GPU needs it.
    """
    module, steps = compiled(text)
    count = int(np.prod(grid))
    done = Execution(module.name, count, count * -(-module.threads // WARP))
    memory = GlobalMemory(regions, done)
    programs = np.stack([x.reshape(-1) for x in np.meshgrid(*map(np.arange, grid), indexing="ij")], 1)
    together = max(1, min(TOGETHER // module.threads, SHARED // max(shared, 1)))
    with np.errstate(all="ignore"):
        for first in range(0, len(programs), together):
            some = programs[first : first + together]
            run(steps, Threads(module, some, grid, shared, parameters, memory, done))
    memory.write_back()
    return done


def run(steps: tuple[Step, ...], s: Threads) -> None:
    """Run some programs to their end."""
    leaders, jumps, happened = {*s.module.labels.values()}, 0, -1
    while s.on.any():
        ready = s.on & ~s.waiting & ~s.spinning
        if not ready.any():
            if not s.spinning.any() or s.happened == happened:
                what = (
                    "threads wait for ever for a barrier in memory"
                    if s.spinning.any()
                    else "not all threads of a program reach a barrier"
                )
                raise Fault(f"{s.module.name}: {what}")
            s.spinning[:], happened = False, s.happened
            continue
        pc = int(s.pc[ready].min())
        here = ready & (s.pc == pc)
        lanes: Any = EVERY if here.all() else np.flatnonzero(here)
        jumps += 1
        if jumps > PATIENCE:
            raise Fault(f"{s.module.name} does not end")
        while True:
            (instruction, function, is_jump) = steps[pc]
            pc, s.lanes = pc + 1, lanes
            if is_jump:
                s.pc[lanes] = pc
            if instruction.guard is not None:
                holds = s.registers[1][instruction.guard.row][lanes] ^ instruction.negated
                if not holds.all():
                    s.lanes = s.numbers()[holds]
            if s.lanes is EVERY or len(s.lanes):
                s.done.opcode = instruction.opcode
                s.done.instructions[instruction.opcode] += (
                    s.n // WARP if s.lanes is EVERY else len(np.unique(s.lanes // WARP))
                )
                try:
                    function(s)
                except Fault as fault:
                    raise Fault(f"{s.module.name}: {fault}: {instruction.line}") from None
            if is_jump:
                break
            if pc in leaders:
                s.pc[lanes] = pc
                break
    for unit in s.units.values():
        unit.end(s)
