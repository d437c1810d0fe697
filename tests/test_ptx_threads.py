"""Instructions that are more than arithmetic: vectors, memory, control flow, and lanes of a warp together."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from tests import ptx_kernels
from tests.ptx_kernels import dtype, elementwise, integers, run, wrapped

F32, F64 = np.float32, np.float64


# -- vectors, special registers, control flow --------------------------------------------------------------------------


def test_registers_are_packed_and_unpacked() -> None:
    given, out = np.arange(32, dtype=np.uint32) * 0x01030507 + 0xA1B2, np.zeros((32, 4), np.uint32)
    run(
        """
        mad.wide.u32 %rd3, %r0, 4, %rd1;
        ld.global.b32 %r1, [%rd3];
        mov.b32 {%rs1, %rs2}, %r1;
        mov.b32 %r2, {%rs2, %rs1};
        mov.b64 %rd4, {%r1, %r2};
        mov.b64 {%r3, _}, %rd4;
        mov.b64 {%rs3, %rs4, %rs5, %rs6}, %rd4;
        mov.b64 %rd5, {%rs6, %rs5, %rs4, %rs3};
        mov.b64 {%r4, %r5}, %rd5;
        mad.wide.u32 %rd3, %r0, 16, %rd0;
        st.global.v4.b32 [%rd3], {%r2, %r3, %r4, %r5};
        """, out, given)  # fmt: skip
    swapped = given >> 16 | given << 16
    assert (out == np.stack([swapped, given, given, swapped], 1)).all()


VECTORS = [(1, 8), (1, 16), (1, 32), (1, 64), (2, 16), (4, 16), (2, 32), (4, 32), (2, 64), (8, 32), (4, 64)]


@pytest.mark.parametrize(
    ("count", "bits", "space"),
    [*((*each, "global") for each in VECTORS), *((*each, "shared") for each in VECTORS if each[0] * each[1] <= 128)],
)
def test_memory(count: int, bits: int, space: str) -> None:
    size, file = bits // 8 * count, ptx_kernels.FILES[str(bits)]
    given, out = np.random.default_rng(0).integers(0, 256, 32 * size, np.uint8), np.zeros(32 * size, np.uint8)
    parts = ", ".join(f"{file}{10 + i}" for i in range(count))
    vector, values = (f".v{count}", f"{{{parts}}}") if count > 1 else ("", parts)
    through = f"""
        st.shared{vector}.b{bits} [%r2], {values};
        ld.shared{vector}.b{bits} {values}, [%r2];
    """ if space == "shared" else ""  # fmt: skip
    run(f"""
        mov.b32 %r1, global_smem;
        mad.lo.s32 %r2, %r0, {size}, %r1;
        mad.wide.u32 %rd3, %r0, {size}, %rd1;
        ld.global{vector}.b{bits} {values}, [%rd3];{through}
        mad.wide.u32 %rd3, %r0, {size}, %rd0;
        st.global{vector}.b{bits} [%rd3], {values};
        """, out, given, shared=32 * size)  # fmt: skip
    assert (out == given).all()


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("read", [None, "size", 0])
def test_copies_are_there_behind_their_wait(size: int, read: str | int | None) -> None:
    given, out = np.random.default_rng(0).integers(1, 256, 32 * size, np.uint8), np.ones(32 * size, np.uint8)
    count = "" if read is None else ", %r5"
    values = {4: "%r10", 8: "%rd10", 16: "{%r10, %r11, %r12, %r13}"}[size]
    kind = "v4.b32" if size == 16 else f"b{8 * size}"
    run(f"""
        mul.lo.s32 %r2, %r0, {size};
        mad.wide.u32 %rd3, %r0, {size}, %rd1;
        mov.b32 %r5, {size if read == "size" else 0};
        cp.async.ca.shared.global [%r2+0], [%rd3+0], {size}{count};
        cp.async.commit_group;
        cp.async.wait_group 0;
        mad.wide.u32 %rd3, %r0, {size}, %rd0;
        ld.shared.{kind} {values}, [%r2];
        st.global.{kind} [%rd3], {values};
        """, out, given, shared=32 * size)  # fmt: skip
    assert (out == (0 if read == 0 else given)).all()


def test_programs_and_threads_know_their_place() -> None:
    out = np.zeros((6, 64), np.uint32)
    run(
        """
        mov.u32 %r1, %ctaid.x;
        mov.u32 %r2, %nctaid.x;
        mad.lo.u32 %r3, %r1, 64, %r0;
        mad.lo.u32 %r4, %r2, 1000, %r3;
        mad.wide.u32 %rd3, %r3, 4, %rd0;
        st.global.b32 [%rd3], %r4;
        """, out, threads=64, programs=6)  # fmt: skip
    assert (out.reshape(-1) == 6000 + np.arange(6 * 64)).all()


def test_threads_part_and_meet_again() -> None:
    """Thread t adds 1 + 2 + ... + t, in a loop of its own length, odd ones twice that."""
    out = np.zeros(32, np.uint32)
    run(
        """
        mov.b32 %r1, 0;
        mov.b32 %r2, 0;
        $loop:
        setp.ge.u32 %p1, %r2, %r0;
        @%p1 bra $done;
        add.s32 %r2, %r2, 1;
        add.s32 %r1, %r1, %r2;
        bra.uni $loop;
        $done:
        and.b32 %r3, %r0, 1;
        setp.eq.b32 %p2, %r3, 1;
        @!%p2 bra $store;
        {
        .reg .b32 twice;
        shl.b32 twice, %r1, 1;
        mov.b32 %r1, twice;
        }
        $store:
        mad.wide.u32 %rd3, %r0, 4, %rd0;
        st.global.b32 [%rd3], %r1;
        """, out)  # fmt: skip
    assert out.tolist() == [t * (t + 1) // 2 * (1 + t % 2) for t in range(32)]


# -- lanes -------------------------------------------------------------------------------------------------------------


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """PTX ISA: shfl.sync, its pseudo-code."""
    segment, limit = c >> 8 & 31, c & 31
    last, first = (lane & segment) | (limit & ~segment & 31), lane & segment
    j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment & 31)}[mode]
    holds = j >= last if mode == "up" else j <= last
    return (j if holds else lane), holds


@pytest.mark.parametrize("mode", ["bfly", "idx", "up", "down"])
@pytest.mark.parametrize("clamp", [31, 0, 0x181F, 0x1C03])
@pytest.mark.parametrize("says", [False, True])
def test_shuffles(mode: str, clamp: int, says: bool) -> None:
    given, where = np.arange(100, 132, dtype=np.uint32), np.arange(32, dtype=np.uint32) * 7 % 32
    out, inside = np.zeros(32, np.uint32), np.ones(32, np.uint32)
    run(f"""
        mad.wide.u32 %rd4, %r0, 4, %rd1;
        ld.global.b32 %r1, [%rd4];
        mad.wide.u32 %rd4, %r0, 4, %rd2;
        ld.global.b32 %r2, [%rd4];
        mov.pred %p1, -1;
        shfl.sync.{mode}.b32 %r3{"|%p1" * says}, %r1, %r2, {clamp}, -1;
        mad.wide.u32 %rd4, %r0, 4, %rd0;
        st.global.b32 [%rd4], %r3;
        selp.b32 %r5, 1, 0, %p1;
        mad.wide.u32 %rd4, %r0, 4, %rd3;
        st.global.b32 [%rd4], %r5;
        """, out, given, where, inside)  # fmt: skip
    wanted = [shuffled(mode, lane, int(where[lane]), clamp) for lane in range(32)]
    assert out.tolist() == [100 + source for source, _ in wanted]
    assert inside.tolist() == [holds or not says for _, holds in wanted]


REDUCTIONS = [
    *((f"redux.sync.{name}.{kind}", kind, function) for kind in ("u32", "s32") for name, function in
      (("max", max), ("min", min), ("add", sum))),
    ("redux.sync.and.b32", "u32", lambda x: int(np.bitwise_and.reduce(np.array(x, np.uint32)))),
    ("redux.sync.or.b32", "u32", lambda x: int(np.bitwise_or.reduce(np.array(x, np.uint32)))),
    ("redux.sync.xor.b32", "u32", lambda x: int(np.bitwise_xor.reduce(np.array(x, np.uint32)))),
]  # fmt: skip


@pytest.mark.parametrize(("opcode", "kind", "meaning"), REDUCTIONS)
def test_reductions_of_a_warp(opcode: str, kind: str, meaning: Callable[[list[int]], int]) -> None:
    given, out = integers(kind, 3), np.zeros(32, dtype(kind))
    run(elementwise(f"{opcode} {{d}}, {{a}}, -1", kind, kind), out, given)
    assert out.tolist() == [wrapped(meaning([int(x) for x in given]), kind)] * 32


@pytest.mark.parametrize(("opcode", "wanted"), [("redux.sync.max.f32", 7.0), ("redux.sync.min.f32", -3.0),
                                                ("redux.sync.max.NaN.f32", math.nan)])  # fmt: skip
def test_reductions_of_floats(opcode: str, wanted: float) -> None:
    given, out = np.zeros(32, F32), np.zeros(32, F32)
    given[[3, 8, 9]] = 7.0, -3.0, math.nan
    run(elementwise(f"{opcode} {{d}}, {{a}}, -1", "f32", "f32"), out, given)
    np.testing.assert_array_equal(out, np.full(32, wanted, F32))


@pytest.mark.parametrize(("mode", "kind"), [("any", "pred"), ("all", "pred"), ("ballot", "b32")])
@pytest.mark.parametrize("votes", [0, 0x80000001, 0xFFFFFFFF])
def test_votes(mode: str, kind: str, votes: int) -> None:
    given, out = np.array([votes >> i & 1 for i in range(32)], np.uint32), np.zeros(32, np.uint32)
    run(elementwise(f"vote.sync.{mode}.{kind} {{d}}, {{a}}, -1", kind, "pred"), out, given)
    assert set(out.tolist()) == {{"any": votes > 0, "all": votes == 0xFFFFFFFF, "ballot": votes}[mode]}


def test_one_lane_of_a_warp_is_elected() -> None:
    out = np.zeros(64, np.uint32)
    run(
        """
        elect.sync %r1|%p1, -1;
        selp.b32 %r2, 10, 20, %p1;
        add.s32 %r2, %r2, %r1;
        mad.wide.u32 %rd3, %r0, 4, %rd0;
        st.global.b32 [%rd3], %r2;
        """, out, threads=64)  # fmt: skip
    assert out.tolist() == ([10] + [20] * 31) * 2
