"""wgmma: matrix products of 4 warps, beside them (PTX ISA: Asynchronous Warpgroup Level Matrix Instructions).

A product is computed when it is issued, and watched until its wait: nobody may touch its accumulators and the operands
in its registers, or write its operands in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from bench.ptx_machine.descriptors import WARP_GROUPS, matrix
from bench.ptx_machine.faults import Fault, Unsupported
from bench.ptx_machine.forms import Execute, Operands, form
from bench.ptx_machine.matrices import COLUMN, ROW, left_operand, parts_of
from bench.ptx_machine.parse import Address, Instruction, Module, Operand, Register, Vector
from bench.ptx_machine.registers import Array, reader, writer
from bench.ptx_machine.threads import WARP_GROUP, Threads

UNFENCED = "registers written between wgmma.fence and the product that uses them"
LOADED = "registers used before the wait for tensor memory to bring them"
SECTION = "Asynchronous Warpgroup Level Matrix Instructions: "


# -- registers that a unit uses ----------------------------------------------------------------------------------------


def used_beside(instruction: Instruction) -> Iterator[Register]:
    """The registers that are in use after an instruction, until a wait."""
    count = 2 if instruction.opcode.startswith("wgmma.mma_async") else instruction.opcode.startswith("tcgen05.ld")
    for operand in instruction.operands[:count]:
        yield from _of(operand) if not isinstance(operand, Register) or count == 1 else ()


def in_use(module: Module) -> dict[str, int]:
    """The registers of a kernel that matrix units use, each with a number."""
    names = dict.fromkeys(r.name for each in module.instructions for r in used_beside(each))
    return {name: i for i, name in enumerate(names)}


def _of(operand: Operand) -> Iterator[Register]:
    parts = operand.parts if isinstance(operand, Vector) else (getattr(operand, "base", operand),)
    yield from (part for part in parts if isinstance(part, Register))


class InUse:
    """Of those registers how many instructions under way use them, and which were written since the last wgmma.fence.

    Attributes:
        loads: of tensor memory, that were not waited for: the registers' numbers, and the threads.
    """

    def __init__(self, s: Threads) -> None:
        self.number = s.module.in_use
        self.users = np.zeros((len(self.number), s.n), np.int16)
        self.unfenced = np.zeros((len(self.number), s.n), bool)
        self.loads: list[tuple[list[int], Array]] = []
        self.any = False

    def numbers(self, registers: Iterable[Register]) -> list[int]:
        return [self.number[r.name] for r in registers]

    def load(self, registers: list[int], lanes: Array) -> None:
        """Registers come from tensor memory, once the threads have waited."""
        for register in registers:
            self.users[register, lanes] += 1
        self.loads.append((registers, lanes))
        self.any = True

    def wait_for_loads(self, lanes: Array) -> None:
        """Threads have."""
        waits, left = np.zeros(self.users.shape[1], bool), []
        waits[lanes] = True
        for registers, loaded in self.loads:
            over = loaded[waits[loaded]]
            for register in registers:
                self.users[register, over] -= 1
            if len(over) < len(loaded):
                left.append((registers, loaded[~waits[loaded]]))
        self.loads, self.any = left, bool(left)

    def end(self, s: Threads) -> None:
        """Programs end with all their work done."""
        if self.users.any():
            raise Fault(f"{s.module.name} ends before its matrix instructions do")


def watched(module: Module, instruction: Instruction, execute: Execute) -> Execute:
    """An instruction that may not touch registers which another one uses.

    By the PTX ISA not what tensor memory will bring either, before the wait; Triton does it, and that is noted.
    """
    names = module.in_use
    touched = [r for operand in instruction.operands for r in _of(operand) if r.name in names]
    if not touched or next(used_beside(instruction), None):
        return execute
    first, stores = instruction.operands[0], instruction.opcode.startswith(("st.", "stmatrix", "tcgen05.st"))
    written = [r for r in ([] if stores or isinstance(first, Address) else _of(first)) if r.name in names]

    def check(s: Threads) -> None:
        unit: InUse = s.unit(InUse)
        if unit.any and unit.users[unit.numbers(touched)][:, s.lanes].any():
            if not unit.loads:
                raise Fault("a register is used before the wait for the matrix instruction that uses it")
            s.done.notes[LOADED] += 1
        for number in unit.numbers(written):
            unit.unfenced[number, s.lanes] = True
        execute(s)

    return check


# -- products ----------------------------------------------------------------------------------------------------------


@dataclass
class Product:
    """One of each of some warp groups: their first threads, groups of products, places read, and registers in use."""

    first: Array
    group: Array
    rows: list[Array]
    registers: list[int]


class Products:
    """Those under way, and how many groups each thread has committed."""

    def __init__(self, s: Threads) -> None:
        self.committed, self.flying = np.zeros(s.n, np.int64), list[Product]()

    def end(self, s: Threads) -> None:
        """Their registers are watched."""


@form(r"wgmma\.fence\.sync\.aligned", "", SECTION + "wgmma.fence")
def fence(operands: Operands) -> Execute:
    def execute(s: Threads) -> None:
        s.whole()
        s.unit(InUse).unfenced[:, s.lanes] = False

    return execute


@form(r"wgmma\.commit_group\.sync\.aligned", "", SECTION + "wgmma.commit_group")
def commit(operands: Operands) -> Execute:
    def execute(s: Threads) -> None:
        s.whole()
        s.unit(Products).committed[s.lanes] += 1

    return execute


@form(r"wgmma\.wait_group\.sync\.aligned", "#", SECTION + "wgmma.wait_group")
def wait(operands: Operands) -> Execute:
    newest = int(operands[0].text, 0)

    def execute(s: Threads) -> None:
        s.whole(WARP_GROUP)
        unit, use, waits, left = s.unit(Products), s.unit(InUse), np.zeros(s.n, bool), list[Product]()
        waits[s.lanes] = True
        for product in unit.flying:
            done = waits[product.first] & (product.group < unit.committed[product.first] - newest)
            threads = (product.first[done][:, None] + np.arange(WARP_GROUP)).reshape(-1)
            for register in product.registers if done.any() else ():
                use.users[register, threads] -= 1
            for rows in product.rows if done.any() else ():
                s.shared.release(rows[done])
                first = product.first[done]
                s.shared.read_by_warp_groups(s.thread[first], s.program[first], rows[done])
            if not done.all():
                rest = [rows[~done] for rows in product.rows]
                left.append(Product(product.first[~done], product.group[~done], rest, product.registers))
        unit.flying = left
        use.any = bool(left)

    return execute


SHAPE = r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(16|8)\.f32\."
HALF, WHOLE = r"(f16|bf16)\.\3", r"(tf32)\.\3"
Left = Callable[[Threads, Array], tuple[Array, list[Array]]]  # matrices and the places where they were read


@form(SHAPE + HALF, "{} a a a # # # #", SECTION + "wgmma.mma_async")
@form(SHAPE + WHOLE, "{} a a a # #", SECTION + "wgmma.mma_async")
def multiply_shared(operands: Operands, columns: str, depth: str, kind: str) -> Execute:
    """d (+)= a b, both in shared memory."""
    turned, a = _turned(operands[4:], 2), reader(operands[1], "b64")

    def left(s: Threads, first: Array) -> tuple[Array, list[Array]]:
        found, rows = matrix(
            s, s.program[first], s.spread(a(s))[::WARP_GROUP], WARP_GROUPS, kind, (64, int(depth)), turned[0]
        )
        return found, [rows]

    return _product(operands, int(columns), int(depth), kind, turned[1], left)


@form(SHAPE + HALF, "{} {} a a # # #", SECTION + "wgmma.mma_async")
@form(SHAPE + WHOLE, "{} {} a a # #", SECTION + "wgmma.mma_async")
def multiply_registers(operands: Operands, columns: str, depth: str, kind: str) -> Execute:
    """The same, a in registers."""
    turned, gets = _turned(operands[4:], 1), [reader(x, "b32") for x in parts_of(operands[1], 4)]

    def left(s: Threads, first: Array) -> tuple[Array, list[Array]]:
        return left_operand(s, gets, kind).reshape(len(first), 64, int(depth)), []

    return _product(operands, int(columns), int(depth), kind, turned[0], left)


def _turned(numbers: Operands, count: int) -> list[bool]:
    """Which operands lie with their rows along memory; both factors must be 1."""
    factors, turned = [x.text for x in numbers[:2]], [x.text for x in numbers[2:]]
    if factors != ["1", "1"] or set(turned) - {"0", "1"}:
        raise Unsupported(f"wgmma with the numbers {factors} and {turned}")
    return [x == "1" for x in turned] or [False] * count


def _product(operands: Operands, columns: int, depth: int, kind: str, turned: bool, left: Left) -> Execute:
    if depth * (4 if kind == "tf32" else 2) != 32:
        raise Unsupported(f"wgmma of {depth} columns of {kind}")
    sums = parts_of(operands[0], columns // 2)
    puts, gets = [writer(x, "f32") for x in sums], [reader(x, "f32") for x in sums]
    b, keeps = reader(operands[2], "b64"), reader(operands[3], "pred")
    own = [
        x for operand in operands[:2] if isinstance(operand, Vector) for x in operand.parts if isinstance(x, Register)
    ]

    def execute(s: Threads) -> None:
        groups = s.whole(WARP_GROUP)
        first, use = s.numbers()[::WARP_GROUP], s.unit(InUse)
        registers = use.numbers(own)
        if use.unfenced[registers][:, s.lanes].any():
            s.done.notes[UNFENCED] += 1
        a, rows = left(s, first)
        right, more = matrix(
            s, s.program[first], s.spread(b(s))[::WARP_GROUP], WARP_GROUPS, kind, (columns, depth), turned
        )
        total = (a @ right.swapaxes(1, 2)).reshape(4 * groups, 16, columns)
        s.done.multiply(groups, 64, columns, depth)
        keep = s.by_warp(keeps(s))
        for i, (put, get) in enumerate(zip(puts, gets, strict=True)):
            new = total[:, ROW + i // 2 % 2 * 8, i // 4 * 8 + 2 * COLUMN + i % 2]
            put(s, (new + np.where(keep, s.by_warp(get(s)), np.float32(0))).astype(np.float32).reshape(-1))
        for register in registers:
            use.users[register, s.lanes] += 1
        use.any = True
        unit = s.unit(Products)
        unit.flying.append(Product(first, unit.committed[first], [*rows, more], registers))

    return execute
