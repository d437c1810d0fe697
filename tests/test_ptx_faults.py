"""What a GPU would not notice, or not always, the machine raises: each watch on kernels that lack a line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.ptx_machine.faults import Fault
from bench.ptx_machine.global_memory import Region
from tests.ptx_kernels import Array, descriptor, placed, registers, run, tcgen05, text, wgmma
from tests.test_ptx_matrices import instruction_descriptor

OUT = np.zeros(256, np.uint32)
STORE = "mad.wide.u32 %rd3, %r0, 4, %rd0;\nst.global.b32 [%rd3], %r5;\n"


def without(body: str, line: str, instead: str = "") -> str:
    """A kernel that lacks its first line with these words."""
    lines = body.splitlines()
    (at, *_) = [i for i, each in enumerate(lines) if line in each]
    return "\n".join([*lines[:at], instead, *lines[at + 1 :]])


def faults(body: str, match: str, *arrays: Array, threads: int = 32, shared: int = 512, programs: int = 1) -> None:
    with pytest.raises(Fault, match=match):
        run(body, *(arrays or (OUT.copy(),)), threads=threads, shared=shared, programs=programs)


# -- global memory -----------------------------------------------------------------------------------------------------


def test_global_memory_has_bounds() -> None:
    faults("st.global.b32 [%rd0+1024], %r0;", "outside every tensor")
    faults("ld.global.b32 %r1, [%rd0+-4];", "outside every tensor")
    faults("mov.b64 %rd1, 0;\nld.global.b32 %r1, [%rd1];", "outside every tensor")
    faults("ld.global.v2.b32 {%r1, %r2}, [%rd0+1020];", "misaligned|outside every tensor")
    faults("ld.global.b32 %r1, [%rd0+2];", "misaligned")


def test_behind_a_tensor_is_not_the_next_one() -> None:
    """However the machine lays its copies out: here both begin and end at multiples of 256 bytes."""
    x, y = (np.zeros(64, np.uint32) for _ in range(2))
    for pointer in ("%rd0", "%rd1"):
        for offset in (-4, 256):
            faults(f"ld.global.b32 %r1, [{pointer}+{offset}];", "outside every tensor", x, y)


def test_what_is_between_the_elements_of_a_tensor_is_outside() -> None:
    from bench.ptx_machine import machine

    data, exists = np.zeros(256, np.uint8), np.tile([True] * 4 + [False] * 4, 32)
    region = Region(4096, data, exists, "x")
    for offset, is_right in ((8, True), (4, False)):
        kernel = text(f"ld.global.b32 %r1, [%rd0+{offset}];", 1)
        given: Any = (kernel, (1, 1, 1), 0, (4096).to_bytes(8, "little"), [region])
        if is_right:
            assert machine.execute(*given).loaded == {"x": 128}
        else:
            with pytest.raises(Fault, match="outside every tensor"):
                machine.execute(*given)


def test_programs_do_not_meet_in_global_memory() -> None:
    own = "mov.u32 %r1, %ctaid.x;\nmad.lo.u32 %r2, %r1, 32, %r0;\nmad.wide.u32 %rd3, %r2, 4, %rd0;\n"
    run(own + "st.global.b32 [%rd3], %r0;\nld.global.b32 %r5, [%rd3];", OUT.copy(), programs=4)
    one = "setp.eq.s32 %p1, %r0, 0;\n"
    faults(
        one + "@%p1 st.global.b32 [%rd0], 7;",
        "writes what another one of the launch reads or writes|write one place",
        programs=4,
    )
    faults(
        own + one + "st.global.b32 [%rd3], %r0;\n@%p1 ld.global.b32 %r5, [%rd0];",
        "reads what another one of the launch writes",
        programs=4,
    )
    faults(
        own + "ld.global.b32 %r5, [%rd0+128];\nst.global.b32 [%rd3], %r0;",
        "writes what another one of the launch reads",
        programs=4,
    )


def test_programs_that_do_not_run_together_do_not_meet_either() -> None:
    body = "mov.u32 %r1, %ctaid.x;\nsetp.eq.s32 %p1, %r0, 0;\nshr.u32 %r2, %r1, 9;\nmad.wide.u32 %rd3, %r2, 4, %rd0;\n"
    run(
        body.replace("shr.u32 %r2, %r1, 9", "mov.b32 %r2, %r1") + "@%p1 st.global.b32 [%rd3], %r1;",
        np.zeros(1024, np.uint32),
        programs=1024,
    )
    late = "setp.eq.s32 %p2, %r1, 0;\nsetp.eq.s32 %p3, %r1, 1023;\nor.pred %p2, %p2, %p3;\nand.pred %p1, %p1, %p2;\n"
    faults(body + late + "@%p1 st.global.b32 [%rd0], 7;", "another one of the launch", programs=1024)


def test_threads_need_a_barrier_in_global_memory_too() -> None:
    body = f"""mov.b32 %r5, %r0;
        {STORE}
        bar.sync 0;
        xor.b32 %r6, %r0, 33;
        mad.wide.u32 %rd4, %r6, 4, %rd0;
        ld.global.b32 %r7, [%rd4];"""
    run(body, OUT.copy(), threads=64)
    faults(without(body, "bar.sync"), "without a barrier", threads=64)


# -- shared memory -----------------------------------------------------------------------------------------------------

EXCHANGE = f"""
shl.b32 %r1, %r0, 2;
st.shared.b32 [%r1], %r0;
bar.sync 0;
xor.b32 %r2, %r1, 132;
ld.shared.b32 %r5, [%r2];
bar.sync 0;
st.shared.b32 [%r1], %r5;
{STORE}
"""  # thread t and 32 others further and 1 beside


def test_shared_memory_between_warps() -> None:
    out = OUT.copy()
    run(EXCHANGE, out, threads=64, shared=256)
    assert out[:64].tolist() == [t ^ 33 for t in range(64)]
    faults(without(EXCHANGE, "bar.sync"), "read what another thread writes", threads=64)
    first, _, rest = EXCHANGE.rpartition("bar.sync 0;")
    faults(first + rest, "overwritten what another thread reads", threads=64)
    faults(
        EXCHANGE.replace("st.shared.b32 [%r1], %r0", "st.shared.b32 [%r1+4], %r0"), "before it is written", threads=64
    )
    faults(EXCHANGE, "out of bounds", threads=64, shared=252)
    faults(EXCHANGE.replace("[%r2]", "[%r2+2]"), "misaligned", threads=64)


def test_lanes_of_a_warp_need_a_barrier_as_well() -> None:
    """Here they run together, and on a GPU in any order."""
    exchange = EXCHANGE.replace("bar.sync 0", "bar.warp.sync -1").replace("132", "4")
    run(exchange, OUT.copy(), shared=128)
    faults(without(exchange, "bar.warp.sync"), "read what another thread writes")
    first, _, rest = exchange.rpartition("bar.warp.sync -1;")
    faults(first + rest, "overwritten what another thread reads")


def test_a_barrier_of_a_warp_is_none_for_others() -> None:
    faults(EXCHANGE.replace("bar.sync 0", "bar.warp.sync -1", 1), "read what another thread writes", threads=64)


def test_two_threads_may_not_write_one_place_at_once() -> None:
    faults("st.shared.b32 [global_smem], %r0;", "two threads write different numbers")
    run("st.shared.b32 [global_smem], 7;", OUT.copy(), shared=64)  # the same number
    faults("mov.b32 %r5, %r0;\nst.global.b32 [%rd0], %r5;", "two threads write")


def test_one_thread_after_another_needs_a_barrier_to_overwrite() -> None:
    body = """setp.lt.s32 %p1, %r0, 32;
        setp.eq.s32 %p2, %r0, 63;
        @%p1 st.shared.b32 [global_smem], 7;
        bar.sync 0;
        @%p2 st.shared.b32 [global_smem], 8;"""
    run(body, OUT.copy(), threads=64, shared=64)
    faults(without(body, "bar.sync"), "overwritten what another thread writes", threads=64)


# -- copies ------------------------------------------------------------------------------------------------------------

COPY = f"""
shl.b32 %r1, %r0, 2;
mad.wide.u32 %rd4, %r0, 4, %rd1;
cp.async.ca.shared.global [%r1], [%rd4], 4;
cp.async.commit_group;
cp.async.ca.shared.global [%r1+256], [%rd4], 4;
cp.async.commit_group;
cp.async.wait_group 1;
bar.sync 0;
xor.b32 %r2, %r1, 132;
ld.shared.b32 %r5, [%r2];
{STORE}
"""


def test_copies() -> None:
    given = np.arange(64, dtype=np.uint32) + 5
    out = OUT.copy()
    run(COPY, out, given, threads=64, shared=512)
    assert out[:64].tolist() == [(t ^ 33) + 5 for t in range(64)]
    some = {"threads": 64, "shared": 512}
    faults(COPY.replace("wait_group 1", "wait_group 2"), "read while a copy to it is under way", out, given, **some)
    faults(without(COPY, "cp.async.commit_group"), "while a copy to it is under way", out, given, **some)
    faults(without(COPY, "bar.sync"), "read what another thread writes", out, given, **some)
    faults(COPY.replace("[%r2]", "[%r2+256]"), "while a copy to it is under way", out, given, **some)
    faults(COPY.replace("[%r1+256]", "[%r1]"), "written while a copy to it is under way", out, given, **some)
    faults(COPY.replace("%rd4, %r0, 4", "%rd4, %r0, 8"), "outside every tensor", out, given, **some)
    later = COPY.replace("[%r1+256]", "[%r1]").replace(
        "cp.async.commit_group;", "cp.async.commit_group;\ncp.async.wait_group 0;\nld.shared.b32 %r9, [global_smem];", 1
    )
    faults(
        later.replace(
            "ld.shared.b32 %r9, [global_smem];", "xor.b32 %r8, %r1, 4;\nbar.sync 0;\nld.shared.b32 %r9, [%r8];"
        ),
        "overwritten what another thread reads",
        out,
        given,
        **some,
    )


# -- barriers and whole warps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;", "bar.warp.sync -1;",
                                  "elect.sync %r1|%p2, -1;",
                                  "redux.sync.add.s32 %r2, %r1, -1;", "vote.sync.any.pred %p2, %p1, -1;"])  # fmt: skip
def test_what_is_for_whole_warps_needs_them(line: str) -> None:
    run(f"setp.lt.s32 %p1, %r0, 32;\n@%p1 {line}", OUT.copy(), threads=64)
    faults(f"setp.lt.s32 %p1, %r0, 31;\n@%p1 {line}", "not all threads of a warp", threads=64)


def test_all_threads_must_reach_a_barrier() -> None:
    branch = "setp.lt.s32 %p1, %r0, 32;\n@%p1 bra $over;\nbar.sync 0;\n$over:\nmov.b32 %r1, 0;"
    faults(branch, "not all threads of a program reach a barrier", threads=64)
    run(
        branch.replace("bar.sync 0;\n$over:", "bar.sync 0;\nbra $end;\n$over:\nbar.sync 0;\n$end:"),
        OUT.copy(),
        threads=64,
    )


def test_a_kernel_that_does_not_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.ptx_machine import machine

    monkeypatch.setattr(machine, "PATIENCE", 1000)
    faults("$again:\nbra $again;", "does not end")


# -- wgmma -------------------------------------------------------------------------------------------------------------


def a_product(left_in_registers: bool = False) -> tuple[str, Array]:
    """wgmma of ones, and the bytes of its matrices."""
    a, *a_steps = placed(np.ones((64, 16), np.float16), 0, False)
    b, *b_steps = placed(np.ones((8, 16), np.float16), 0, False)
    left = registers(4, 50) if left_in_registers else str(descriptor(0, *a_steps, 0))
    before = "".join(f"mov.b32 %r{50 + i}, 0;\n" for i in range(4)) if left_in_registers else ""
    turned = ", 0" if left_in_registers else ", 0, 0"
    return wgmma(a.size + b.size, 8, left, descriptor(a.size, *b_steps, 0), "f16", turned, before), np.concatenate(
        [a, b]
    )


@pytest.mark.parametrize(("line", "instead", "fault"), [
    ("fence.proxy", "", "no proxy fence"),
    ("bar.sync", "", "no barrier between a write and a matrix unit"),
    ("wait_group", "", "used before the wait"),
    ("wait_group", "wgmma.wait_group.sync.aligned 1;", "used before the wait"),
    ("commit_group", "", "used before the wait"),
    ("wait_group", "mov.b32 %r100, 0;", "used before the wait"),
    ("wait_group", "st.shared.b32 [global_smem], 0;", "overwritten while a matrix instruction may read it"),
    ("wait_group", "wgmma.wait_group.sync.aligned 0;\nst.shared.b32 [global_smem], 0;", "what another thread reads"),
    ("wgmma.mma_async", "@%p14 wgmma.mma_async", "not all threads of a warp"),
])  # fmt: skip
def test_products_of_warp_groups(line: str, instead: str, fault: str) -> None:
    body, memory = a_product()
    out = np.zeros((128, 4), np.float32)
    run(body, out, memory, threads=128, shared=memory.size)
    assert (out == 16).all()
    if instead.startswith("@"):
        body = body.replace("mov.pred %p1, -1;", "mov.pred %p1, -1;\nsetp.lt.u32 %p14, %r0, 90;").replace(line, instead)
    else:
        body = without(body, line, instead)
    faults(body, fault, out, memory, threads=128, shared=memory.size)


def test_registers_that_are_written_behind_the_fence_are_noted() -> None:
    """By the PTX ISA a fence is between; Triton sets accumulators to zero behind it."""
    body, memory = a_product()
    for text_, notes in ((body, 0), (without(body, "wgmma.fence"), 1)):
        out = np.zeros((128, 4), np.float32)
        done = run(text_, out, memory, threads=128, shared=memory.size)
        assert (out == 16).all()
        assert sum(done.notes.values()) == notes


def test_registers_of_a_product_are_its_own_until_the_wait() -> None:
    body, memory = a_product(left_in_registers=True)
    out = np.zeros((128, 4), np.float32)
    run(body, out, memory, threads=128, shared=memory.size)
    faults(
        without(body, "commit_group", "mov.b32 %r50, 0;"),
        "used before the wait",
        out,
        memory,
        threads=128,
        shared=memory.size,
    )


def test_a_kernel_may_not_end_before_its_products() -> None:
    body, memory = a_product()
    body = body[: body.index("wgmma.wait_group")]
    faults(
        body,
        "ends before its matrix instructions do",
        np.zeros((128, 4), np.float32),
        memory,
        threads=128,
        shared=memory.size,
    )


# -- tensor memory -----------------------------------------------------------------------------------------------------


def a_tensor_product() -> tuple[str, Array]:
    """tcgen05 of ones, what was there before being added, and the bytes of its matrices."""
    a, *a_steps = placed(np.ones((128, 16), np.float16), 0, False)
    b, *b_steps = placed(np.ones((16, 16), np.float16), 0, False)
    before = f"""{"".join(f"mov.b32 %r{50 + i}, 0f40A00000;" for i in range(16))}
        mov.pred %p3, -1;
        tcgen05.st.sync.aligned.32x32b.x16.b32 [%r5], {registers(16, 50)};
        tcgen05.wait::st.sync.aligned;"""
    at = [descriptor(s, *steps, 0, tensor_cores=True) for s, steps in ((0, a_steps), (a.size, b_steps))]
    shape = instruction_descriptor(128, 16, "f16", (False, False))
    return tcgen05(a.size + b.size, 16, str(at[0]), at[1], shape, "f16", 128, before), np.concatenate([a, b])


@pytest.mark.parametrize(("line", "instead", "fault"), [
    ("fence.proxy", "", "no proxy fence"),
    ("wait::st", "", "has not waited for"),
    ("tcgen05.st", "", "adds to what was never written"),
    ("wait::ld", "", "given back while it is in use"),
    ("tcgen05.commit", "", "wait for ever"),
    ("mbarrier.init", "", "there is no barrier at"),
    ("mbarrier.try_wait", "mov.pred complete, -1;", "used before the wait for the product"),
    ("mbarrier.try_wait", "mbarrier.try_wait.parity.shared::cta.b64 complete, [%r3], 1;", "wait for ever"),
    ("tcgen05.dealloc", "", "does not give its tensor memory back"),
    ("tcgen05.dealloc", "@%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r2, 128;", "not what was allocated"),
    ("tcgen05.alloc", "@%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 200;", "power of two"),
    ("mbarrier.inval", "@%p2 st.shared.b32 [%r3], 0;", "a barrier is overwritten"),
    ("mbarrier.inval", "@%p2 ld.shared.b32 %r99, [%r3];", "a barrier is read"),
    ("tcgen05.commit", "@%p2 st.shared.b32 [0], 0;\n", "overwritten while a matrix instruction may read it"),
    ("add.s32 %r5, %r2, %r6", "add.s32 %r5, %r2, 0;", "the 32 lanes of its number"),
    ("add.s32 %r5, %r2, %r6", "add.s32 %r5, %r2, %r6;\nadd.s32 %r5, %r5, 250;", "column 265 of 256"),
    ("mbarrier.init", "@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;", "several threads"),
])  # fmt: skip
def test_tensor_memory(line: str, instead: str, fault: str) -> None:
    body, memory = a_tensor_product()
    out, more = np.zeros((128, 16), np.float32), memory.size + 32
    run(body, out, memory, threads=128, shared=more)
    assert (out == 21).all()
    faults(without(body, line, instead), fault, out, memory, threads=128, shared=more)


def test_registers_that_are_used_before_tensor_memory_brings_them_are_noted() -> None:
    """By the PTX ISA they must not be; Triton does it."""
    body, memory = a_tensor_product()
    early = body.replace("tcgen05.wait::ld", "add.f32 %r100, %r100, %r100;\ntcgen05.wait::ld")
    for text_, notes in ((body, 0), (early, 1)):
        out = np.zeros((128, 16), np.float32)
        done = run(text_, out, memory, threads=128, shared=memory.size + 32)
        assert out[0].tolist() == [21 * (1 + notes), *[21] * 15]
        assert sum(done.notes.values()) == notes


def test_a_product_needs_a_barrier_behind_what_threads_stored() -> None:
    body, memory = a_tensor_product()
    store = body[body.index("tcgen05.st") : body.index("wait::st")] + "wait::st.sync.aligned;\n"
    late = body.replace(store, "").replace("mov.b32 %r7, 0;", f"mov.b32 %r7, 0;\n{store}")
    faults(
        late,
        "no barrier between threads and a product",
        np.zeros((128, 16), np.float32),
        memory,
        threads=128,
        shared=memory.size + 32,
    )


def test_copies_that_no_proxy_fence_follows_are_noted() -> None:
    """By the PTX ISA one has to; Triton leaves it out at times."""
    body, memory = a_product()
    lines = [line for line in body.splitlines() if "301" not in line]
    at = next(i for i, line in enumerate(lines) if "fence.proxy" in line)
    copies = [
        "cp.async.cg.shared.global [%r300], [%rd60], 16;" if "add.s64 %rd60" in line else "" for line in lines[:at]
    ]
    both = [part for pair in zip(lines[:at], copies, strict=True) for part in pair]
    both = [f"@%p15 {part}" if part.startswith("cp.async") else part for part in both]
    wait = ["cp.async.commit_group;", "cp.async.wait_group 0;"]
    for order, notes in ((["fence.proxy.async;", *wait], 2), ([*wait, "fence.proxy.async;"], 0)):
        out = np.zeros((128, 4), np.float32)
        done = run("\n".join([*both, *order, *lines[at + 1 :]]), out, memory, threads=128, shared=memory.size)
        assert (out == 16).all()
        assert sum(done.notes.values()) == notes
