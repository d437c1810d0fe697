"""tcgen05: tensor memory, and matrix products beside the threads (PTX ISA: TensorCore 5th Generation Family).

Tensor memory has 128 lanes of 512 columns of 32 bits for each program; a warp reaches the 32 lanes of its number modulo
4. A product is computed when it is issued, and watched until threads know, by a barrier in memory, that it is done.
"""

from __future__ import annotations

import numpy as np

from bench.ptx_machine.barriers import MemoryBarriers, Work, by_address, one_each
from bench.ptx_machine.descriptors import TENSOR_CORES, matrix
from bench.ptx_machine.faults import Fault, Unsupported
from bench.ptx_machine.forms import Execute, Operands, form
from bench.ptx_machine.matrices import parts_of
from bench.ptx_machine.moves import addresses
from bench.ptx_machine.parse import Operand, Register
from bench.ptx_machine.registers import Array, numbers, reader, writer
from bench.ptx_machine.threads import LANE, WARP, Threads
from bench.ptx_machine.warp_groups import InUse

SECTION = "TensorCore 5th Generation Instructions: "
LANES, COLUMNS = 128, 512
KINDS = {("f16", 0): "f16", ("f16", 1): "bf16", ("tf32", 2): "tf32"}


class TensorMemory:
    """That of every program.

    Attributes:
        columns: allocated.
        wrote_at: [programs, quarters, halves, columns], when a warp stored in its quarter of the lanes or a product did
            (1), on the clock of shared memory; 0: never. Quarters have a lower and an upper half.
        storing, loading: what a quarter's warp has not waited for.
        read_at: when it was loaded last.
    """

    def __init__(self, s: Threads) -> None:
        self.columns = np.zeros(s.programs, np.int64)
        self.data = np.zeros((s.programs, LANES, COLUMNS), np.uint32)
        self.wrote_at, self.read_at = np.zeros((2, s.programs, 4, 2, COLUMNS), np.int32)
        self.storing, self.loading = np.zeros((2, s.programs, 4, 2, COLUMNS), bool)

    def check(self, s: Threads, program: Array, first: int, last: int) -> None:
        """That columns are allocated."""
        if first < 0 or (self.columns[program] < last).any():
            raise Fault(f"tensor memory: columns {first} to {last} of {int(self.columns[program].min())}")

    def end(self, s: Threads) -> None:
        """All of it must have been given back, or the next program never gets any."""
        if self.columns.any():
            raise Fault(f"{s.module.name} does not give its tensor memory back")


@form(
    r"tcgen05\.alloc\.cta_group::1\.sync\.aligned\.shared::cta\.b32",
    "[a] a",
    SECTION + "tcgen05.alloc, dealloc, relinquish_alloc_permit",
)
def allocate(operands: Operands) -> Execute:
    at, count = addresses(operands[0], "u32"), reader(operands[1], "u32")

    def execute(s: Threads) -> None:
        s.whole()
        unit, lanes = s.unit(TensorMemory), s.numbers()[::WARP]
        program, columns = one_each(s.program[lanes]), s.spread(count(s))[::WARP].astype(np.int64)
        if (unit.columns[program] != 0).any() or (
            (columns < 32) | (columns > COLUMNS) | (columns & (columns - 1) != 0)
        ).any():
            raise Fault("tensor memory: columns must be a power of two from 32 to 512, asked for once")
        unit.columns[program] = columns
        s.shared.store(s, lanes, at(s)[::WARP], np.zeros((len(lanes), 4), np.uint8))  # where they begin

    return execute


@form(
    r"tcgen05\.relinquish_alloc_permit\.cta_group::1\.sync\.aligned",
    "",
    SECTION + "tcgen05.alloc, dealloc, relinquish_alloc_permit",
)
def relinquish(operands: Operands) -> Execute:
    def execute(s: Threads) -> None:
        s.whole()

    return execute


@form(
    r"tcgen05\.dealloc\.cta_group::1\.sync\.aligned\.b32",
    "a a",
    SECTION + "tcgen05.alloc, dealloc, relinquish_alloc_permit",
)
def free(operands: Operands) -> Execute:
    start, count = (reader(x, "u32") for x in operands)

    def execute(s: Threads) -> None:
        s.whole()
        unit, program = s.unit(TensorMemory), one_each(s.program[s.numbers()[::WARP]])
        if (s.spread(count(s))[::WARP] != unit.columns[program]).any() or s.spread(start(s)).any():
            raise Fault("tensor memory: given back is not what was allocated")
        met = s.shared.met[program][:, None, None, None]
        if unit.storing[program].any() or unit.loading[program].any() or (unit.read_at[program] >= met).any():
            raise Fault("tensor memory: given back while it is in use")
        _check_products(
            s, s.numbers(), np.tile(np.arange(COLUMNS), (len(program), 1)), np.tile([0, 1], (len(program), 1))
        )
        unit.columns[program] = 0

    return execute


def _check_products(s: Threads, lanes: Array, columns: Array, halves: Array) -> None:
    """That no product is writing [warps, columns] of [warps, halves], as far as some threads know."""
    for work in s.unit(MemoryBarriers).works:
        first, last = work.columns
        warps = ((columns >= first) & (columns < last)).any(1) & np.isin(halves, work.halves).any(1)
        at = np.full(s.programs, -1)
        at[work.program] = np.arange(len(work.program))
        some = lanes.reshape(len(columns), -1)[warps].reshape(-1)
        of = at[s.program[some]]
        if not work.seen[of, s.thread[some]][of >= 0].all():
            raise Fault("tensor memory: used before the wait for the product that writes it")


# -- threads and tensor memory -----------------------------------------------------------------------------------------


def _cells(s: Threads, address: Array, count: int, split: int | None) -> tuple[Array, Array, tuple[Array, ...]]:
    """Of each thread the lane, [warps, 32], and the columns, [warps, 32, count], that it reaches.

    Also what each warp reaches, as `TensorMemory` knows it: [warps, halves, columns].

    Args:
        split: of 16x32bx2: the upper half of a warp is at the lanes of the lower one, so many columns further.
    """
    s.whole()
    taddr, lanes = s.by_warp(address).astype(np.int64), s.numbers()[::WARP]
    program, quarter = s.program[lanes][:, None], s.warp[lanes][:, None] % 4
    if (taddr != taddr[:, :1]).any():
        raise Fault("tensor memory: threads of a warp give several addresses")
    first, base = taddr[:, :1] & 0xFFFF, taddr[:, :1] >> 16
    half = base - quarter * 32
    if not np.isin(half, 0 if split is None else (0, 16)).all():
        raise Fault("tensor memory: a warp reaches the 32 lanes of its number modulo 4 only")
    further = np.zeros(WARP, np.int64) if split is None else LANE // 16 * split
    columns = first[:, :, None] + further[:, None] + np.arange(count)
    touched = columns[:, ::16].reshape(len(lanes), -1)
    unit: TensorMemory = s.unit(TensorMemory)
    if (touched >= unit.columns[program]).any():
        raise Fault(f"tensor memory: column {int(touched.max())} of {int(unit.columns[program].min())}")
    halves = np.tile([0, 1], (len(lanes), 1)) if split is None else half // 16
    _check_products(s, s.numbers(), touched, halves)
    here = program[:, :, None], quarter[:, :, None], halves[:, :, None], touched[:, None]
    return base + (LANE if split is None else LANE % 16), columns, here


def _store(operands: Operands, count: int, split: int | None, values: Operand) -> Execute:
    at, gets = addresses(operands[0], "u32"), [reader(x, "b32") for x in parts_of(values, count)]

    def execute(s: Threads) -> None:
        unit, (lane, columns, here) = s.unit(TensorMemory), _cells(s, at(s), count, split)
        if unit.loading[here].any():
            raise Fault("tensor memory: written while it is loaded")
        unit.storing[here] = True
        data = np.stack([s.by_warp(get(s)) for get in gets], 2)
        unit.data[here[0], lane[:, :, None], columns] = data

    return execute


def _load(operands: Operands, count: int, split: int | None) -> Execute:
    parts = parts_of(operands[0], count)
    at, puts = addresses(operands[1], "u32"), [writer(x, "b32") for x in parts]
    own = [x for x in parts if isinstance(x, Register)]

    def execute(s: Threads) -> None:
        unit, use, (lane, columns, here) = s.unit(TensorMemory), s.unit(InUse), _cells(s, at(s), count, split)
        if unit.storing[here].any():
            raise Fault("tensor memory: loaded before the wait for what is stored")
        if not unit.wrote_at[here].all():
            raise Fault("tensor memory: loaded before it is written")
        unit.loading[here], unit.read_at[here] = True, s.shared.now[here[0]]
        data = unit.data[here[0], lane[:, :, None], columns]
        for i, put in enumerate(puts):
            put(s, np.ascontiguousarray(data[:, :, i]).reshape(-1))
        use.load(use.numbers(own), s.numbers())

    return execute


@form(r"tcgen05\.st\.sync\.aligned\.32x32b\.x(\d+)\.b32", "[a] {}|a", SECTION + "tcgen05.st")
def store(operands: Operands, count: str) -> Execute:
    return _store(operands, int(count), None, operands[1])


@form(r"tcgen05\.st\.sync\.aligned\.16x32bx2\.x(\d+)\.b32", "[a] # {}|a", SECTION + "tcgen05.st")
def store_halves(operands: Operands, count: str) -> Execute:
    return _store(operands, int(count), int(operands[1].text, 0), operands[2])


@form(r"tcgen05\.ld\.sync\.aligned\.32x32b\.x(\d+)\.b32", "{}|a [a]", SECTION + "tcgen05.ld")
def load(operands: Operands, count: str) -> Execute:
    return _load(operands, int(count), None)


@form(r"tcgen05\.ld\.sync\.aligned\.16x32bx2\.x(\d+)\.b32", "{}|a [a] #", SECTION + "tcgen05.ld")
def load_halves(operands: Operands, count: str) -> Execute:
    return _load(operands, int(count), int(operands[2].text, 0))


@form(r"tcgen05\.wait::(ld|st)\.sync\.aligned", "", SECTION + "tcgen05.wait")
def wait(operands: Operands, which: str) -> Execute:
    def execute(s: Threads) -> None:
        s.whole()
        unit, lanes = s.unit(TensorMemory), s.numbers()
        program, quarter = s.program[lanes[::WARP]], s.warp[lanes[::WARP]] % 4
        if which == "st":
            now = s.shared.now[program][:, None, None]
            now = np.where(unit.storing[program, quarter], now, unit.wrote_at[program, quarter])
            unit.wrote_at[program, quarter] = now
            unit.storing[program, quarter] = False
            return
        unit.loading[program, quarter] = False
        s.unit(InUse).wait_for_loads(lanes)

    return execute


# -- products ----------------------------------------------------------------------------------------------------------


@form(r"tcgen05\.mma\.cta_group::1\.kind::(f16|tf32)", "[a] a a a a", SECTION + "tcgen05.mma")
def multiply_shared(operands: Operands, kind: str) -> Execute:
    """d (+)= a b, both in shared memory."""
    return _multiply(operands, kind, in_shared=True)


@form(r"tcgen05\.mma\.cta_group::1\.kind::(f16|tf32)", "[a] [a] a a a", SECTION + "tcgen05.mma")
def multiply_tensor(operands: Operands, kind: str) -> Execute:
    """The same, a in tensor memory."""
    return _multiply(operands, kind, in_shared=False)


def _multiply(operands: Operands, kind: str, in_shared: bool) -> Execute:
    to = addresses(operands[0], "u32")
    a = reader(operands[1], "b64") if in_shared else addresses(operands[1], "u32")
    b, shape, keeps = reader(operands[2], "b64"), reader(operands[3], "u32"), reader(operands[4], "pred")

    def execute(s: Threads) -> None:
        lanes, unit = s.numbers(), s.unit(TensorMemory)
        program, rows, columns, depth, element, turned = one_each(s.program[lanes]), *_shape(s.spread(shape(s)), kind)
        right, places = matrix(s, program, s.spread(b(s)), TENSOR_CORES, element, (columns, depth), turned[1])
        if in_shared:
            left, more = matrix(s, program, s.spread(a(s)), TENSOR_CORES, element, (rows, depth), turned[0])
            read = [places, more]
        else:
            left, read = _left(s, unit, program, a(s), rows, element), [places]
        lane, first, halves = _place(to(s), rows)
        unit.check(s, program, first, first + columns)
        _ready(s, unit, program, halves, first, first + columns, written=False)
        old = unit.data[program[:, None], lane, first : first + columns].view(np.float32)
        s.done.multiply(len(program), rows, columns, depth)
        keep = s.spread(keeps(s))
        if keep.any():
            _ready(s, unit, program[keep], halves, first, first + columns, written=True)
        total = left @ right.swapaxes(1, 2) + np.where(keep[:, None, None], old, np.float32(0))
        unit.data[program[:, None], lane, first : first + columns] = total.astype(np.float32).view(np.uint32)
        unit.wrote_at[_part(program, halves, first, first + columns)] = 1
        works = s.unit(MemoryBarriers).works
        works.add(Work(program, read, (first, first + columns), halves, np.zeros((len(program), s.threads), bool)))

    return execute


def _one(x: Array) -> int:
    """A number that must be the same for all."""
    if (x != x[0]).any():
        raise Unsupported("programs whose addresses differ")
    return int(x[0])


def _shape(descriptor: Array, kind: str) -> tuple[int, int, int, str, tuple[bool, bool]]:
    """Rows, columns, depth, type and which operands are turned (PTX ISA: Instruction Descriptor)."""
    bits = _one(descriptor)
    known = 3 << 4 | 7 << 7 | 7 << 10 | 3 << 15 | 63 << 17 | 31 << 24
    a, b, rows, columns = bits >> 7 & 7, bits >> 10 & 7, (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8
    if bits & ~known or bits >> 4 & 3 != 1 or a != b or (kind, a) not in KINDS or rows not in (64, 128):
        raise Unsupported(f"an instruction descriptor {bits:#x} of {kind}")
    return rows, columns, 8 if kind == "tf32" else 16, KINDS[kind, a], (bool(bits >> 15 & 1), bool(bits >> 16 & 1))


def _part(program: Array, halves: tuple[int, ...], first: int, last: int) -> tuple[Array, ...]:
    """Columns of all quarters, as `TensorMemory` knows them."""
    return np.ix_(program, np.arange(4), np.array(halves), np.arange(first, last))


def _ready(
    s: Threads, unit: TensorMemory, program: Array, halves: tuple[int, ...], first: int, last: int, written: bool
) -> None:
    """That threads are done with columns before a product uses them, and, where it reads, have written them."""
    here, met = _part(program, halves, first, last), s.shared.met[program][:, None, None, None]
    if unit.storing[here].any() or unit.loading[here].any():
        raise Fault("tensor memory: a product uses what a warp has not waited for")
    if (unit.wrote_at[here] >= met).any() or (unit.read_at[here] >= met).any():
        raise Fault("tensor memory: no barrier between threads and a product")
    if written and not unit.wrote_at[here].all():
        raise Fault("tensor memory: a product adds to what was never written")


def _place(address: Array, rows: int) -> tuple[Array, int, tuple[int, ...]]:
    """The lane of every row of a matrix in tensor memory, its first column, and the halves of the lanes that it has.

    Of 64 rows each warp has 16 lanes, its lower or its upper ones.
    """
    where = _one(address)
    base, first, row = where >> 16, where & 0xFFFF, np.arange(rows)
    if base not in ((0,) if rows == LANES else (0, 16)):
        raise Unsupported(f"a matrix of {rows} rows from lane {base} on")
    if rows == LANES:
        return row, first, (0, 1)
    return base + row // 16 * 32 + row % 16, first, (base // 16,)


def _left(s: Threads, unit: TensorMemory, program: Array, address: Array, rows: int, kind: str) -> Array:
    """[programs, rows, depth] from tensor memory, 32 bytes a row."""
    lane, first, halves = _place(address, rows)
    unit.check(s, program, first, first + 8)
    _ready(s, unit, program, halves, first, first + 8, written=True)
    return numbers(np.ascontiguousarray(unit.data[program[:, None], lane, first : first + 8]), kind).astype(np.float64)


@form(
    r"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one(?:\.shared::cluster)?\.b64",
    "[a]",
    SECTION + "tcgen05.commit",
)
def commit(operands: Operands) -> Execute:
    at = addresses(operands[0], "u32")

    def execute(s: Threads) -> None:
        unit, lanes = s.unit(MemoryBarriers), s.numbers()
        for address, some in by_address(s, at(s)):
            program = one_each(s.program[lanes[some]])
            unit.arrive(s, address, program, unit.works)

    return execute
