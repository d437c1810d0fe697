"""Matrix instructions of the machine: where lanes hold numbers, where shared memory does, and their products.

Where a lane holds a number is said by the PTX ISA's formulas, one number at a time. The left matrix of a product has a
single 1 in each row, so that each number of the right one has to arrive unchanged at a place of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.ptx_machine.counts import Execution
from tests.ptx_kernels import (
    Array,
    descriptor,
    into_shared,
    load_each,
    placed,
    registers,
    run,
    store_each,
    tcgen05,
    wgmma,
)

LANES = [(lane, lane // 4, lane % 4) for lane in range(32)]  # lane, group, thread in it, as the PTX ISA says
NUMBERS: dict[str, Any] = {"f16": np.float16, "bf16": np.uint16, "tf32": np.float32}
RANDOM = np.random.default_rng(0)


def as_numbers(x: Array, kind: str) -> Array:
    """Small integers as numbers of a type: bits of bf16 are the upper half of fp32's."""
    if kind == "bf16":
        return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return x.astype(NUMBERS[kind])


def choosing(rows: int, depth: int) -> Array:
    """[rows, depth], a single 1 in each row, every column taken."""
    return np.eye(depth)[(5 * np.arange(rows) + 3) % depth]


def distinct(depth: int, columns: int) -> Array:
    """[depth, columns], integers that all types hold."""
    return RANDOM.permutation(depth * columns).reshape(depth, columns) % 251 - 100.0


# -- ldmatrix, stmatrix ------------------------------------------------------------------------------------------------


def fragment(matrix: Array, lane: int, turned: bool) -> Array:
    """The two numbers of an 8 x 8 matrix that a lane holds."""
    matrix = matrix.T if turned else matrix
    return matrix[lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("turned", [False, True])
def test_ldmatrix(count: int, turned: bool) -> None:
    rows = RANDOM.integers(0, 1 << 16, (32, 8)).astype(np.uint16)  # at row r of shared memory
    order = RANDOM.permutation(32).astype(np.uint32)  # lane l says where row l % 8 of matrix l // 8 is
    out = np.zeros((32, count), np.uint32)
    run(f"""{into_shared(512, 32, "%rd1")}
        bar.warp.sync -1;
        {load_each(1, 50, "%rd2")}
        shl.b32 %r50, %r50, 4;
        ldmatrix.sync.aligned.m8n8.x{count}{".trans" * turned}.shared.b16 {registers(count)}, [%r50];
        {store_each(count)}
        """, out, rows, order, shared=512)  # fmt: skip
    for lane, i in np.ndindex(32, count):
        matrix = rows[order[8 * i : 8 * i + 8]]
        assert (out[lane, i : i + 1].view(np.uint16) == fragment(matrix, lane, turned)).all()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("turned", [False, True])
def test_stmatrix(count: int, turned: bool) -> None:
    matrices = RANDOM.integers(0, 1 << 16, (count, 8, 8)).astype(np.uint16)
    order = RANDOM.permutation(8 * count).astype(np.uint32)
    held = np.array([[fragment(m, lane, turned) for m in matrices] for lane in range(32)]).view(np.uint32)[:, :, 0]
    out = np.zeros((8 * count, 8), np.uint16)
    run(f"""{load_each(count, 100, "%rd1")}
        setp.lt.u32 %p1, %r0, {8 * count};
        mad.wide.u32 %rd4, %r0, 4, %rd2;
        @%p1 ld.global.b32 %r50, [%rd4];
        shl.b32 %r50, %r50, 4;
        stmatrix.sync.aligned.m8n8.x{count}{".trans" * turned}.shared.b16 [%r50], {registers(count)};
        bar.warp.sync -1;
        shl.b32 %r51, %r0, 4;
        cvt.u64.u32 %rd5, %r51;
        add.s64 %rd5, %rd5, %rd0;
        @%p1 ld.shared.v4.b32 {{%r60, %r61, %r62, %r63}}, [%r51];
        @%p1 st.global.v4.b32 [%rd5], {{%r60, %r61, %r62, %r63}};
        """, out, held, order, shared=512)  # fmt: skip
    assert (out[order] == matrices.reshape(-1, 8)).all()


# -- mma.sync ----------------------------------------------------------------------------------------------------------


def places(rows: int, depth: int, pair: int) -> list[list[tuple[int, int]]]:
    """Of each lane the (row, column) of all its numbers of the left matrix: `pair` of them in a register."""
    found = []
    for _, group, thread in LANES:
        numbers = []
        for column in range(0, depth, 4 * pair):
            for row in range(0, rows, 8):
                numbers += [(group + row, column + pair * thread + i) for i in range(pair)]
        found.append(numbers)
    return found


def in_registers(matrix: Array, where: list[list[tuple[int, int]]]) -> Array:
    """[lanes, registers] of 32 bits."""
    numbers = np.array([[matrix[place] for place in of_lane] for of_lane in where], matrix.dtype)
    return np.ascontiguousarray(numbers).view(np.uint32)


def accumulators(columns: int) -> list[list[tuple[int, int]]]:
    """Of each lane the (row, column) of its numbers of 16 rows of a result."""
    return [
        [
            (group + 8 * row, column + 2 * thread + i)
            for column in range(0, columns, 8)
            for row in (0, 1)
            for i in (0, 1)
        ]
        for _, group, thread in LANES
    ]


@pytest.mark.parametrize(
    ("depth", "kind"), [(16, "f16"), (16, "bf16"), (8, "f16"), (8, "bf16"), (8, "tf32"), (4, "tf32")]
)
def test_mma(depth: int, kind: str) -> None:
    pair = 1 if kind == "tf32" else 2
    left, right, addend = choosing(16, depth), distinct(depth, 8), RANDOM.integers(-9, 9, (16, 8)).astype(np.float32)
    a = in_registers(as_numbers(left, kind), places(16, depth, pair))
    b = in_registers(as_numbers(right.T, kind), places(8, depth, pair))
    operands = f"{registers(a.shape[1], 10)}, {registers(b.shape[1], 20)}"
    c, out = in_registers(addend, accumulators(8)), np.zeros((32, 4), np.float32)
    run(f"""{load_each(a.shape[1], 10, "%rd1")}{load_each(b.shape[1], 20, "%rd2")}{load_each(4, 30, "%rd3")}
        mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {registers(4)}, {operands}, {registers(4, 30)};
        {store_each(4)}
        """, out, a, b, c)  # fmt: skip
    wanted = in_registers((left @ right + addend).astype(np.float32), accumulators(8)).view(np.float32)
    assert (out == wanted).all()


def test_tf32_has_ten_bits_of_fraction() -> None:
    a = np.full((32, 4), np.float32(1 + 2**-10 + 2**-11).view(np.uint32))
    operands = f"{registers(4, 10)}, {registers(2, 20)}"
    b, out = np.full((32, 2), np.float32(1).view(np.uint32)), np.zeros((32, 4), np.float32)
    run(f"""{load_each(4, 10, "%rd1")}{load_each(2, 20, "%rd2")}{"".join(f"mov.b32 %r{30 + i}, 0;" for i in range(4))}
        mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {registers(4)}, {operands}, {registers(4, 30)};
        {store_each(4)}
        """, out, a, b)  # fmt: skip
    assert (out == 8 * (1 + 2**-10)).all()


def asked_of_units(done: Execution) -> tuple[int, int]:
    """FLOPs, and the wavefronts in which matrix units read shared memory: no layout of theirs has conflicts."""
    (of,) = (of for opcode, of in done.wavefronts.items() if "mma" in opcode)
    assert of.wavefronts == of.ideal
    return done.flops, of.wavefronts


# -- wgmma -------------------------------------------------------------------------------------------------------------


def results_of_group(total: Array) -> Array:
    """[128, registers] of a result of 64 rows."""
    columns = total.shape[1]
    return np.concatenate(
        [in_registers(total[16 * w : 16 * w + 16].astype(np.float32), accumulators(columns)) for w in range(4)]
    ).view(np.float32)


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("columns", "kind"), [(64, "f16"), (8, "bf16"), (32, "bf16"), (16, "f16")])
def test_wgmma_with_both_matrices_in_shared_memory(
    swizzle: int, turned: tuple[bool, bool], columns: int, kind: str
) -> None:
    left, right = choosing(64, 16), distinct(16, columns)
    a, *a_steps = placed(as_numbers(left, kind), swizzle, turned[0])
    b, *b_steps = placed(as_numbers(right.T, kind), swizzle, turned[1])
    start = -(-a.size // 1024) * 1024
    memory = np.concatenate([a, np.zeros(start - a.size, np.uint8), b])
    out = np.zeros((128, columns // 2), np.float32)
    flags = ", " + ", ".join(str(int(x)) for x in turned)
    text = wgmma(
        memory.size, columns, str(descriptor(0, *a_steps, swizzle)), descriptor(start, *b_steps, swizzle), kind, flags
    )
    done = run(text, out, memory, threads=128, shared=memory.size)
    assert (out == results_of_group(left @ right)).all()
    assert asked_of_units(done) == (2 * 64 * columns * 16, (64 + columns) * 32 // 128)


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
def test_wgmma_of_tf32(swizzle: int) -> None:
    left, right = choosing(64, 8), distinct(8, 24)
    a, *a_steps = placed(as_numbers(left, "tf32"), swizzle, False)
    b, *b_steps = placed(as_numbers(right.T, "tf32"), swizzle, False)
    start = -(-a.size // 1024) * 1024
    memory, out = np.concatenate([a, np.zeros(start - a.size, np.uint8), b]), np.zeros((128, 12), np.float32)
    text = wgmma(
        memory.size, 24, str(descriptor(0, *a_steps, swizzle)), descriptor(start, *b_steps, swizzle), "tf32", ""
    )
    run(text, out, memory, threads=128, shared=memory.size)
    assert (out == results_of_group(left @ right)).all()


@pytest.mark.parametrize(("kind", "depth"), [("f16", 16), ("bf16", 16), ("tf32", 8)])
def test_wgmma_with_its_left_matrix_in_registers_and_a_step_inside_of_a_line(kind: str, depth: int) -> None:
    pair, whole = 1 if kind == "tf32" else 2, distinct(2 * depth, 16)
    left = choosing(64, depth)
    a = np.concatenate(
        [in_registers(as_numbers(left[16 * w : 16 * w + 16], kind), places(16, depth, pair)) for w in range(4)]
    )
    b, *steps = placed(as_numbers(whole.T, kind), 3 if pair == 1 else 2, False)
    b_start, out = 32, np.zeros((128, 8), np.float32)  # the second half of the depth
    turned = "" if kind == "tf32" else ", 0"
    text = wgmma(
        b.size,
        16,
        registers(4, 50),
        descriptor(b_start, *steps, 3 if pair == 1 else 2),
        kind,
        turned,
        load_each(4, 50, "%rd2"),
    )
    run(text, out, b, a, threads=128, shared=b.size)
    assert (out == results_of_group(left @ whole[depth:])).all()


def test_wgmma_adds_to_what_is_there_where_it_is_told_to() -> None:
    left, right = choosing(64, 16), distinct(16, 8)
    a, *a_steps = placed(as_numbers(left, "f16"), 0, False)
    b, *b_steps = placed(as_numbers(right.T, "f16"), 0, False)
    memory = np.concatenate([a, b])
    text = wgmma(memory.size, 8, str(descriptor(0, *a_steps, 0)), descriptor(a.size, *b_steps, 0)).replace(
        "0f00000000", "0f40A00000"
    )
    for keeps, added in (("-1", 5.0), ("0", 0.0)):
        out = np.zeros((128, 4), np.float32)
        run(text.replace("mov.pred %p1, -1", f"mov.pred %p1, {keeps}"), out, memory, threads=128, shared=memory.size)
        assert (out == results_of_group(left @ right + added)).all()


# -- tcgen05 -----------------------------------------------------------------------------------------------------------


def instruction_descriptor(rows: int, columns: int, kind: str, turned: tuple[bool, bool]) -> int:
    of = {"f16": 0, "bf16": 1, "tf32": 2}[kind]
    return 1 << 4 | of << 7 | of << 10 | turned[0] << 15 | turned[1] << 16 | columns // 8 << 17 | rows // 16 << 24


def loaded(total: Array) -> Array:
    """[128, registers] of a result: a row a thread, or of 64 rows half a row."""
    rows, columns = total.shape
    if rows == 128:
        return total.astype(np.float32)
    found = np.zeros((128, columns // 2), np.float32)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        half = columns // 2 * (lane // 16)
        found[thread] = total[16 * warp + lane % 16, half : half + columns // 2]
    return found


@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(("rows", "columns", "kind"), [(128, 64, "bf16"), (64, 32, "f16"), (64, 64, "tf32")])
def test_tcgen05_with_both_matrices_in_shared_memory(
    swizzle: int, turned: tuple[bool, bool], rows: int, columns: int, kind: str
) -> None:
    if kind == "tf32":
        turned = False, False
    depth = 8 if kind == "tf32" else 16
    left, right = choosing(rows, depth), distinct(depth, columns)
    a, *a_steps = placed(as_numbers(left, kind), swizzle, turned[0])
    b, *b_steps = placed(as_numbers(right.T, kind), swizzle, turned[1])
    start = -(-a.size // 1024) * 1024
    memory = np.concatenate([a, np.zeros(start - a.size, np.uint8), b])
    shape, unit = instruction_descriptor(rows, columns, kind, turned), "tf32" if kind == "tf32" else "f16"
    wanted = loaded(left @ right)
    out = np.zeros(wanted.shape, np.float32)
    at = [descriptor(s, *steps, swizzle, tensor_cores=True) for s, steps in ((0, a_steps), (start, b_steps))]
    text = tcgen05(memory.size, columns, str(at[0]), at[1], shape, unit, rows)
    done = run(text, out, memory, threads=128, shared=memory.size + 32)
    assert (out == wanted).all()
    assert asked_of_units(done) == (2 * rows * columns * depth, (rows + columns) * 32 // 128)


def test_tcgen05_with_its_left_matrix_in_tensor_memory() -> None:
    left, right = choosing(128, 16), distinct(16, 32)
    a = as_numbers(left, "bf16").view(np.uint32)  # [128, 8]
    b, *steps = placed(as_numbers(right.T, "bf16"), 1, False)
    shape, out = instruction_descriptor(128, 32, "bf16", (False, False)), np.zeros((128, 32), np.float32)
    before = f"""{load_each(8, 50, "%rd2")}
        tcgen05.st.sync.aligned.32x32b.x8.b32 [%r5+64], {registers(8, 50)};
        tcgen05.wait::st.sync.aligned;"""
    text = tcgen05(b.size, 32, "[%r2+64]", descriptor(0, *steps, 1, tensor_cores=True), shape, "f16", 128, before)
    run(text, out, b, a, threads=128, shared=b.size + 32)
    assert (out == left @ right).all()


def test_tcgen05_adds_to_what_threads_stored_in_half_of_the_lanes() -> None:
    left, right, addend = choosing(64, 16), distinct(16, 32), RANDOM.integers(-9, 9, (128, 16)).astype(np.float32)
    a, *a_steps = placed(as_numbers(left, "f16"), 3, False)
    b, *b_steps = placed(as_numbers(right.T, "f16"), 3, False)
    start = -(-a.size // 1024) * 1024
    memory, out = np.concatenate([a, np.zeros(start - a.size, np.uint8), b]), np.zeros((128, 16), np.float32)
    at = [descriptor(s, *steps, 3, tensor_cores=True) for s, steps in ((0, a_steps), (start, b_steps))]
    upper = 16 << 16
    before = f"""{load_each(16, 50, "%rd2")}
        mov.pred %p3, -1;
        add.s32 %r2, %r2, {upper};
        add.s32 %r5, %r5, {upper};
        tcgen05.st.sync.aligned.16x32bx2.x16.b32 [%r5+0], 16, {registers(16, 50)};
        tcgen05.wait::st.sync.aligned;"""
    text = tcgen05(
        memory.size, 32, str(at[0]), at[1], instruction_descriptor(64, 32, "f16", (False, False)), "f16", 64, before
    )
    text = text.replace("@%p1 tcgen05.dealloc", f"sub.s32 %r2, %r2, {upper};\n@%p1 tcgen05.dealloc")
    run(text, out, memory, addend, threads=128, shared=memory.size + 32)
    assert (out == loaded(left @ right) + addend).all()
