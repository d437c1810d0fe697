"""What the machine counts of kernels, against counts made by hand: sectors and lines, wavefronts, FLOPs, units."""

from __future__ import annotations

import json
from math import gcd
from pathlib import Path

import numpy as np
import pytest

from bench.ptx_machine import counts
from bench.ptx_machine.counts import Requests, Wavefronts
from bench.tiles import assembly
from isa_triton import tiles
from tests.compiling import run_compiling
from tests.ptx_kernels import registers, run

LANES = np.arange(32)
LOADS = {4: "ld.global.b32 %r1", 8: "ld.global.v2.b32 {%r1, %r2}", 16: "ld.global.v4.b32 {%r1, %r2, %r3, %r4}"}
STORES = {4: "st.shared.b32 [%r9], %r1", 8: "st.shared.v2.b32 [%r9], {%r1, %r2}",
          16: "st.shared.v4.b32 [%r9], {%r1, %r2, %r3, %r4}"}  # fmt: skip


def requests(body: str, size: int = 1 << 14, threads: int = 32, programs: int = 1) -> Requests:
    """Of a kernel on an array of so many bytes."""
    done = run(body, np.zeros(size // 4, np.uint32), threads=threads, programs=programs)
    return counts.total(done.requests.values(), Requests)


def wavefronts(body: str, shared: int = 1 << 14, threads: int = 32) -> dict[str, Wavefronts]:
    return dict(run(body, np.zeros(32, np.uint32), threads=threads, shared=shared).wavefronts)


# -- global memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", LOADS)
@pytest.mark.parametrize("stride", [0, 16, 32, 48, 64, 128, 160, 256])
@pytest.mark.parametrize("start", [0, 16, 32, 112])
def test_a_strided_load_takes_the_sectors_and_lines_that_it_touches(size: int, stride: int, start: int) -> None:
    body = f"mad.wide.u32 %rd1, %r0, {stride}, %rd0;\n{LOADS[size]}, [%rd1+{start}];"
    address = start + stride * LANES
    wanted = Requests(1, 32 * size, len({*(address // 32)}), len({*(address // 128)}))
    assert requests(body) == wanted
    if (size, stride, start) == (4, 32, 0):  # by hand: a sector a lane, four to a line
        assert wanted == Requests(1, 128, 32, 8)


@pytest.mark.parametrize("size", LOADS)
def test_rows_without_gaps_take_no_sector_more_than_their_bytes(size: int) -> None:
    found = requests(f"mad.wide.u32 %rd1, %r0, {size}, %rd0;\n{LOADS[size]}, [%rd1];")
    assert found == Requests(1, 32 * size, size, size // 4)


def test_warps_and_programs_ask_each_for_themselves() -> None:
    assert requests("ld.global.b32 %r1, [%rd0];", threads=96, programs=5) == Requests(15, 15 * 128, 15, 15)


def test_lanes_that_are_switched_off_ask_for_nothing() -> None:
    guarded = "setp.lt.u32 %p1, %r0, {};\nmad.wide.u32 %rd1, %r0, 32, %rd0;\n@%p1 st.global.b32 [%rd1], %r0;"
    assert requests(guarded.format(5), threads=64) == Requests(1, 20, 5, 2)
    assert requests(guarded.format(37), threads=64) == Requests(2, 148, 37, 10)
    assert requests(guarded.format(0)) == Requests()


def test_loads_and_stores_are_told_apart_and_so_are_tensors() -> None:
    body = """mad.wide.u32 %rd3, %r0, 4, %rd0;
              ld.global.b32 %r1, [%rd3];
              mad.wide.u32 %rd4, %r0, 8, %rd1;
              st.global.v2.b32 [%rd4], {%r1, %r0};
              ld.global.b64 %rd5, [%rd4];"""
    done = run(body, np.zeros(32, np.uint32), np.zeros(64, np.uint32))
    assert done.loaded == {0: 128, 1: 256}
    assert done.stored == {1: 256}
    assert done.requests["ld.global.b64", 1] == done.requests["st.global.v2.b32", 1] == Requests(1, 256, 8, 2)


def test_a_copy_asks_for_what_it_reads_and_writes_all_of_its_bytes() -> None:
    body = """mad.wide.u32 %rd3, %r0, 64, %rd0;
              mul.lo.u32 %r9, %r0, 16;
              setp.lt.u32 %p1, %r0, 20;
              selp.b32 %r2, 16, 0, %p1;
              cp.async.cg.shared.global [%r9], [%rd3], 16, %r2;
              cp.async.wait_all;"""
    done = run(body, np.zeros(512, np.uint32), shared=512)
    (asked,) = done.requests.values()
    assert asked == Requests(1, 320, 20, 10)
    assert dict(done.wavefronts) == {"cp.async.cg.shared.global": Wavefronts(1, 4, 4)}


# -- shared memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", range(1, 34))
def test_a_stride_of_n_words_conflicts_as_often_as_n_has_factors_of_32(words: int) -> None:
    found = wavefronts(f"mul.lo.u32 %r9, %r0, {4 * words};\nst.shared.b32 [%r9], %r0;")
    assert found == {"st.shared.b32": Wavefronts(1, gcd(words, 32), 1)}


@pytest.mark.parametrize("size", STORES)
@pytest.mark.parametrize("row", [16, 32, 48, 64, 128, 144, 256])
def test_wide_accesses_are_served_in_phases_of_128_bytes(size: int, row: int) -> None:
    (found,) = wavefronts(f"mul.lo.u32 %r9, %r0, {row};\n{STORES[size]};").values()
    wavefronts_ = 0
    for phase in (row * LANES).reshape(size // 4, -1):  # by the definition: words of each bank, lane by lane
        words = {int(address) // 4 + i for address in phase for i in range(size // 4)}
        wavefronts_ += max(sum(word % 32 == bank for word in words) for bank in range(32))
    assert found == Wavefronts(1, wavefronts_, size // 4)


def test_what_lanes_read_together_is_read_once() -> None:
    body = """mul.lo.u32 %r9, %r0, 4;
              st.shared.b32 [%r9], %r0;
              bar.sync 0;
              ld.shared.b32 %r1, [0];
              and.b32 %r8, %r9, 64;
              ld.shared.b32 %r2, [%r8];
              and.b32 %r7, %r0, 1;
              ld.shared.b16 %rs1, [%r9+2];"""
    found = wavefronts(body, threads=64, shared=256)
    assert found["ld.shared.b32"] == Wavefronts(4, 4, 4)
    assert found["ld.shared.b16"] == found["st.shared.b32"] == Wavefronts(2, 2, 2)


def test_warps_do_not_conflict_with_each_other() -> None:
    found = wavefronts("mul.lo.u32 %r9, %r0, 8;\nst.shared.b32 [%r9], %r0;", threads=96)
    assert found == {"st.shared.b32": Wavefronts(3, 6, 3)}


@pytest.mark.parametrize(("row", "times"), [(16, 1), (32, 2), (64, 4), (128, 8), (144, 1), (80, 1)])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_matrices_take_a_wavefront_each_where_their_rows_lie_in_different_banks(
    row: int, times: int, matrices: int
) -> None:
    body = f"""mul.lo.u32 %r9, %r0, {row};
               stmatrix.sync.aligned.m8n8.x{matrices}.shared.b16 [%r9], {registers(matrices)};
               bar.sync 0;
               ldmatrix.sync.aligned.m8n8.x{matrices}.shared.b16 {registers(matrices)}, [%r9];"""
    found = wavefronts(body)
    assert list(found.values()) == [Wavefronts(1, times * matrices, matrices)] * 2


# -- products and units ------------------------------------------------------------------------------------------------


def test_products_are_counted_whole() -> None:
    multiply = "mma.sync.aligned.m16n8k{}.row.col.f32.{}.{}.f32 {}, {}, {}, {};"
    body = "\n".join(multiply.format(k, kind, kind, registers(4, 10), *of, registers(4, 20)) for k, kind, of in (
        (16, "f16", (registers(4, 30), registers(2, 40))), (8, "tf32", (registers(4, 30), registers(2, 40))),
    ))  # fmt: skip
    done = run(body, np.zeros(32, np.uint32), threads=64, programs=3)
    assert done.flops == 6 * 2 * 16 * 8 * (16 + 8)
    assert done.warps == 6
    assert done.units()["matrix"] == 12


def test_units_are_those_of_machine_code() -> None:
    assert {*counts.UNITS} == {*assembly.UNITS}
    of = {
        "matrix": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 tcgen05.mma.cta_group::1.kind::f16",
        "special": "ex2.approx.f32 ex2.approx.ftz.f32 lg2.approx.f32 rcp.approx.ftz.f32 div.full.f32 sqrt.approx.f32",
        "fma": "fma.rn.f32 add.f32 sub.rn.f32 mul.rn.f32x2 add.rn.bf16x2 mul.lo.s32 mad.lo.s32 mad.wide.u32 mul.hi.u32",
        "alu": "add.s32 sub.s64 mov.b32 cvt.rn.f16x2.f32 setp.lt.s32 selp.b32 max.f32 and.b32 shl.b32 prmt.b32 bfe.u32 "
        "cvta.to.global.u64 lop3.b32",
        "shared": "ld.shared.b32 st.shared.v4.b32 ldmatrix.sync.aligned.m8n8.x4.shared.b16 shfl.sync.bfly.b32 "
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 tcgen05.ld.sync.aligned.32x32b.x64.b32 redux.sync.max.u32",
        "global": "ld.global.v4.b32 st.global.b16 cp.async.cg.shared.global",
        "control": "bra bra.uni ret bar.sync bar.warp.sync cp.async.wait_group cp.async.commit_group elect.sync "
        "wgmma.fence.sync.aligned wgmma.wait_group.sync.aligned fence.proxy.async ld.param.b64 "
        "mbarrier.try_wait.parity.shared::cta.b64 tcgen05.wait::ld.sync.aligned tcgen05.commit.cta_group::1 "
        "vote.sync.any",
    }  # fmt: skip
    for name, opcodes in of.items():
        for opcode in opcodes.split():
            assert counts.unit(opcode) == name, opcode


# -- tiles report --execute --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_a_report_counts_what_a_launch_asks_for(target: str, tmp_path: Path) -> None:
    """Windows of 8x8, K = 64, V = 128, 2 heads: a program reads q, k and v of its group once, and writes out."""
    problem = "--tokens", "64", "--widths", "64", "128", "--heads", "2", "--partition", "local", "--maps", "3"
    file, programs = tmp_path / "report.json", 5
    words = "report", "--target", target, *problem, "--execute", str(programs), "--jobs", "1", "--json", str(file)
    done = run_compiling("-m", "bench", "tiles", *words, "--cache", str(tmp_path), "--format", "csv")
    assert done.returncode == 0, done.stderr
    (kernel,) = json.loads(file.read_text())
    counted, sizes = kernel["executed"], {"load q": 64, "load k": 64, "load v": 128, "store out": 128}
    assert (counted["programs"], counted["warps"]) == (programs, programs * kernel["warps"])
    tile = tiles.lookup(target, "forward", 64, 128, "bfloat16", 64, False)
    chunks = (-(-width // block) * block for width, block in ((64, tile.block_k), (128, tile.block_v)))
    assert counted["flops"] == programs * 2 * 64 * 64 * sum(chunks)
    assert kernel["flops_done"] == counted["flops"] * kernel["programs"] / programs
    requests = {f"{each['kind']} {each['of']}": each for each in counted["requests"]}
    assert {*requests} == {*sizes}
    for name, width in sizes.items():
        asked = requests[name]
        assert asked["bytes"] == programs * 64 * width * 2
        assert asked["sectors"] == asked["bytes"] // 32  # no byte of a sector is moved for nothing
        assert asked["bytes"] // 128 <= asked["lines"] <= asked["sectors"]
    assert counted["instructions"].keys() == kernel["instructions"].keys()
    for unit in ("matrix", "global"):  # which ptxas leaves as they are
        assert counted["instructions"][unit] == counted["warps"] * kernel["instructions"][unit][2]
    for each in counted["wavefronts"]:
        assert each["wavefronts"] >= each["ideal"] >= each["requests"] > 0
    title = f"# Executed by an emulator: forward on {'A100' if target == 'sm_80' else 'H100'} ({target}): local, 64 "
    assert any(line.startswith(title) for line in done.stdout.splitlines())
