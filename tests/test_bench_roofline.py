"""The roofline's inputs on pieces of code that are easy to count, its formula, and both against real binaries."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.tiles.assembly import (
    Instruction,
    Stretch,
    find_loops,
    matrix_flops,
    sass_instructions,
    shared_bytes,
    stretches,
    unit,
    waits,
)
from bench.tiles.binaries import Binary
from bench.tiles.compile import Launch, Problem, Tensors
from bench.tiles.program import Loop, Op, read_program
from bench.tiles.roofline import LAUNCH, MACHINES, predict
from bench.tiles.search import Task
from isa_triton.partition import Partition
from isa_triton.tiles import Tile
from tests import guard
from tests.compiling import run_compiling

# -- instructions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "takes", "shared", "flops"),
    [
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], RZ", "matrix", (128 + 64) * 8, 2 * 64 * 128 * 16 // 4),
        ("HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR8].tnspB, R24", "matrix", 128 * 8, 2 * 64 * 128 * 16 // 4),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", "matrix", 0, 2 * 16 * 8 * 16),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", "matrix", 0, 2 * 16 * 8 * 8),
        ("UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR4]", "matrix", 0, None),
        ("v_mfma_f32_32x32x8_bf16 v[2:17], v[38:39], v[32:33], v[2:17]", "matrix", 0, 2 * 32 * 32 * 8),
        ("v_wmma_f32_16x16x16_bf16 v[2:9], v[38:45], v[30:37], v[2:9]", "matrix", 0, 2 * 16 * 16 * 16),
        ("LDSM.16.M88.4 R20, [R55]", "shared", 512, None),
        ("STSM.16.M88 [R55], R4", "shared", 128, None),
        ("LDGSTS.E.BYPASS.128 [R41], desc[UR26][R42.64], P5", "global", 512, None),
        ("STS.64 [R4], R2", "shared", 256, None),
        ("SHFL.BFLY PT, R4, R5, 0x1, 0x1f", "shared", 128, None),
        ("ds_read2st64_b64 v[2:5], v1 offset1:1", "shared", 512, None),
        ("ds_load_b128 v[0:3], v4", "shared", 512, None),
        ("ds_load_2addr_b64 v[0:3], v4", "shared", 512, None),
        ("ds_store_2addr_stride64_b32 v0, v1, v2", "shared", 256, None),
        ("MUFU.EX2 R4, R5", "special", 0, None),
        ("v_exp_f32_e32 v1, v2", "special", 0, None),
        ("IMAD.WIDE.U32 R4, R5, R6, R7", "fma", 0, None),
        ("v_pk_mul_f32 v[2:3], v[4:5], v[6:7]", "fma", 0, None),
        ("FSETP.GT.AND P0, PT, R4, R5, PT", "alu", 0, None),
        ("v_add_u32_e32 v1, v2, v3", "alu", 0, None),
        ("STG.E.128 desc[UR14][R2.64], R4", "global", 0, None),
        ("UIADD3 UR4, UR5, UR6, URZ", "control", 0, None),
        ("s_waitcnt vmcnt(0)", "control", 0, None),
    ],
)
def test_what_an_instruction_is(text: str, takes: str, shared: int, flops: int | None) -> None:
    opcode = text.split()[0].partition("x")[0] if text.startswith("HGMMA") else text.split()[0]
    instruction = Instruction(opcode, text=text)
    assert unit(opcode) == takes
    assert shared_bytes(instruction, lanes=32) == shared
    if takes == "matrix":
        assert matrix_flops(instruction) == flops


# -- loops -------------------------------------------------------------------------------------------------------------

NESTED = """
\t//## File "/k/common.py", line 9 inlined at "/k/forward.py", line 5
\t//## File "/k/forward.py", line 5
        /*0000*/                   LDG.E R4, desc[UR14][R2.64] ;
.L_outer:
\t//## File "/k/forward.py", line 7
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/               @P0 BRA `(.L_behind) ;
.L_inner:
\t//## File "/k/common.py", line 9 inlined at "/k/forward.py", line 8
\t//## File "/k/forward.py", line 8
        /*0030*/                   LDG.E R4, desc[UR14][R2.64] ;
        /*0040*/              @!P0 BRA `(.L_wait) ;
.L_back:
        /*0050*/               @P1 BRA `(.L_inner) ;
.L_behind:
        /*0060*/               @P6 CALL.REL.NOINC `(.L_out) ;
        /*0070*/                   BRA `(.L_outer) ;
.L_out:
        /*0080*/                   STG.E desc[UR14][R2.64], R4 ;
        /*0090*/                   EXIT ;
.L_wait:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR20], R0 ;
        /*00b0*/              @!P0 BRA `(.L_wait) ;
        /*00c0*/                   BRA `(.L_back) ;
.L_end:
        /*00d0*/                   BRA `(.L_end);
"""
PLACES = {
    (("common.py", 9), ("forward.py", 5)): (),
    (("forward.py", 7),): (0,),
    (("common.py", 9), ("forward.py", 8)): (0, 1),
}


def test_loops_are_jumps_back_that_nothing_goes_around() -> None:
    code = list(sass_instructions(NESTED))
    loops = {min(body): set(body) for body in find_loops(code).values()}
    assert loops == {1: {*range(1, 8), 10, 11, 12}, 3: {3, 4, 5, 10, 11, 12}, 10: {10, 11}, 13: {13}}


def test_stretches_run_as_often_as_the_source_says() -> None:
    found = {s.nest: s for s in stretches(list(sass_instructions(NESTED)), PLACES, lanes=32)}
    assert found[()].units == {"global": 2, "control": 2}
    assert found[(0,)].units == {"matrix": 1, "control": 3}
    assert found[(0, 1)].units["global"] == 1
    assert found[(0,)].flops == 2 * 16 * 8 * 16


def test_a_place_without_its_line_is_found_by_its_call() -> None:
    elsewhere = NESTED.replace('common.py", line 9 inlined at "/k/forward.py", line 8', 'common.py", line 1')
    assert {s.nest for s in stretches(list(sass_instructions(elsewhere)), PLACES, 32)} == {(), (0,), (0, 1)}


def sequence(*texts: str) -> list[Instruction]:
    return [Instruction(text.split()[0], text=text) for text in texts]


COPY, MATRIX, LOAD = "LDGDEPBAR", "HMMA.16816.F32.BF16 R4, R8, R12, R4", "LDG.E.128 R4, desc[UR14][R2.64]"


@pytest.mark.parametrize(
    ("texts", "repeated", "at_once", "late"),
    [
        ((COPY, "DEPBAR.LE SB0, 0x0", MATRIX), True, 1, 0),
        (("DEPBAR.LE SB0, 0x0", COPY, MATRIX), True, 0, 1),  # the next iteration's
        ((MATRIX, "DEPBAR.LE SB0, 0x1", COPY), True, 0, 1 / 2),  # that of two iterations ahead
        (("DEPBAR.LE SB0, 0x3", MATRIX, COPY), True, 0, 1 / 4),
        ((LOAD, LOAD, MATRIX, MATRIX), True, 1, 0),
        ((LOAD, MATRIX, LOAD, "STS [R1], R4"), False, 2, 0),
        ((COPY, COPY, "DEPBAR.LE SB0, 0x1", MATRIX, COPY, "DEPBAR.LE SB0, 0x1", "DEPBAR.LE SB0, 0x0"), False, 2, 0),
        ((MATRIX, LOAD), False, 1, 0),  # still to come at the end
        (("buffer_load_dwordx4 v1", "buffer_load_dwordx4 v2", "s_waitcnt vmcnt(1)", "s_waitcnt vmcnt(0)"), False, 1, 0),
        ((MATRIX, "STG.E [R2], R4"), True, 0, 0),
    ],
)
def test_waits(texts: tuple[str, ...], repeated: bool, at_once: float, late: float) -> None:
    assert waits(sequence(*texts), repeated) == (at_once, late)


# -- Triton's IR -------------------------------------------------------------------------------------------------------

TTIR = """
#loc = loc("/k/forward.py":5:1)
#loc2 = loc("/k/common.py":9:4)
#loc3 = loc("row"(#loc2))
#loc4 = loc(callsite(#loc3 at #loc))
module {
  tt.func public @kernel(%q.data: !tt.ptr<bf16>, %bias.data: !tt.ptr<f32>, %h.tokens: i32, %slots: i32) {
    %c0 = arith.constant 0 : i32 loc(#loc)
    %c16 = arith.constant 16 : i32 loc(#loc)
    %0 = tt.get_program_id x : i32 loc(#loc)
    %tokens = arith.shrsi %h.tokens, %c1 : i32 loc(#loc)
    %c1 = arith.constant 1 : i32 loc(#loc)
    %rows = tt.splat %q.data : !tt.ptr<bf16> -> tensor<32x!tt.ptr<bf16>> loc(#loc)
    scf.for %item = %0 to %h.tokens step %slots  : i32 {
      %acc = scf.for %start = %c0 to %c64 step %c16 iter_args(%p = %rows) -> (tensor<32xf32>)  : i32 {
        %fixed = tt.load %rows : tensor<32x16x!tt.ptr<bf16>> loc(#loc4)
        %next = tt.addptr %p, %start : tensor<32x16x!tt.ptr<bf16>>, tensor<32x16xi32> loc(#loc)
        %moving = tt.load %next : tensor<32x16x!tt.ptr<bf16>> loc(#loc4)
        %d = tt.dot %fixed, %moving, %x : tensor<32x16xbf16> * tensor<16x64xbf16> -> tensor<32x64xf32> loc(#loc)
        scf.yield %next : tensor<32xf32> loc(#loc)
      } loc(#loc)
      %b = tt.addptr %bias.data, %item : !tt.ptr<f32>, i32 loc(#loc)
      tt.store %b, %acc, %m : tensor<32x32x!tt.ptr<f32>> loc(#loc)
    } loc(#loc)
    %c64 = arith.constant 64 : i32 loc(#loc)
  }
}
"""


ARGUMENTS = ("q.data", "bias.data", "h.tokens", "slots")


@pytest.mark.parametrize("other_names", [False, True])
def test_the_ir_is_read_with_what_it_will_hoist(other_names: bool) -> None:
    declared = TTIR.replace("    %c64 = arith.constant 64 : i32 loc(#loc)\n", "")
    ttir = declared.replace("    %0 =", "    %c64 = arith.constant 64 : i32 loc(#loc)\n    %0 =")
    if other_names:  # Triton 3.6 says whose a number is, and not which
        for i, name in enumerate(ARGUMENTS):
            ttir = ttir.replace(f"%{name}", f"%{name.partition('.')[0]}_{i}")
    loops, ops, places = read_program(ttir, ARGUMENTS)
    assert loops[0] == Loop("program", "h.tokens", "slots")
    assert loops[1].trips({}) == 4
    assert ops == [
        Op("load", (32, 16), 2, "q", (0,)),  # the same for every start, but the loop over items stores
        Op("load", (32, 16), 2, "q", (0, 1)),
        Op("dot", (32, 64, 16), 2, "", (0, 1)),
        Op("store", (32, 32), 4, "bias", (0,)),
    ]
    assert places[("common.py", 9), ("forward.py", 5)] == (0, 1)


def test_loops_over_items_run_as_often_as_the_mean_program() -> None:
    values = {"program": np.arange(4), "items": 10, "slots": 4}
    assert Loop("program", "items", "slots").trips(values) == 10 / 4


# -- the formula -------------------------------------------------------------------------------------------------------

PROBLEM = Problem(Partition.local((64, 64), (8, 8)), 64, 64, maps=33)  # 2112 groups: 16 for each of 132 units
PROGRAM = (Op("load", (64, 64), 2, "q", ()), Op("store", (64, 64), 2, "out", ()), Op("dot", (64, 64, 64), 2, "", ()))
QUIET = Stretch((), {"matrix": 1}, 2 * 64**3 // 4, 0, 0.0, 0.0)


def planted(stretch: Stretch = QUIET, ctas_per_sm: int = 4, matrix: str = "HGMMA") -> Binary:
    return Binary(64, 0, 0, 0, 0, 4, ctas_per_sm, 1, {matrix: 1}, 0, (), (), PROGRAM, (stretch,))


LAUNCHED = Launch("sm_90", PROBLEM, "isa_triton.backend.kernels.forward", "forward_kernel", 2112, {}, {})
H100 = MACHINES["H100"]


def test_memory_binds_a_kernel_that_only_moves() -> None:
    prediction = predict(LAUNCHED, planted(), H100)
    moved = 2 * 33 * 64 * 64 * 64 * 2
    assert prediction.bound == "DRAM"
    assert prediction.work.distinct == prediction.work.bytes == moved
    assert prediction.seconds == pytest.approx(LAUNCH + moved / H100.dram)
    assert prediction.flops == prediction.work.flops == 2112 * 2 * 64**3
    assert prediction.busy["matrix"] == pytest.approx(prediction.flops / H100.matrix["16-bit"])


def test_the_busiest_unit_binds_and_the_rest_is_paid_once_a_wave() -> None:
    stretch = Stretch((), {"matrix": 1, "special": 1000, "alu": 800}, QUIET.flops, 0, 3.0, 0.1)
    prediction = predict(LAUNCHED, planted(stretch), H100)
    special = 4 * 32 * 1000 / 16 / H100.clock
    alone = 2 * 64**3 / (H100.matrix["16-bit"] / 132) + special + 3 * H100.latency
    assert prediction.bound == "special"
    assert prediction.waves == 4
    assert prediction.seconds == pytest.approx(LAUNCH + 16 * special + 4 * (alone - special))


def test_waiting_binds_where_nothing_else_runs() -> None:
    waiting = Stretch((), {"matrix": 1}, QUIET.flops, 0, 0.0, 50.0)
    seconds = [predict(LAUNCHED, planted(waiting, ctas), H100) for ctas in (1, 2, 4, 8, 16)]
    assert all(prediction.bound == "latency" for prediction in seconds)
    assert all(a.seconds > 1.5 * b.seconds for a, b in pairwise(seconds))


def test_products_of_single_warps_are_slower_on_an_h100() -> None:
    four, one = (predict(LAUNCHED, planted(matrix=kind), H100) for kind in ("HGMMA", "HMMA"))
    assert one.busy["matrix"] == pytest.approx(four.busy["matrix"] / 0.629)


def test_a_cta_that_does_not_fit_has_no_time() -> None:
    with pytest.raises(ValueError, match="no CTA of forward_kernel fits"):
        predict(LAUNCHED, planted(ctas_per_sm=0), H100)


# -- real binaries, and the interpreter --------------------------------------------------------------------------------

REAL = """
import json, re, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from triton import knobs
from bench.tiles.binaries import Binaries
from bench.tiles.compile import Problem, compile_launch
from bench.tiles.report import kernels
from bench.tiles.roofline import MACHINES
from bench.tiles.search import Task
from isa_triton.partition import Partition
from isa_triton.tiles import Tile

cache, found = Path(sys.argv[1]), []
for step, geometry, tile in json.loads(sys.argv[2]):
    size, window = geometry
    problem = Problem(Partition.local(tuple(size), tuple(window)), 24, 40, 2, True, "float16", 1)
    launch = Task(MACHINES["H100"], problem, step).launch(Tile(*tile))
    with ThreadPoolExecutor(1) as pool:
        (kernel,) = kernels([launch], MACHINES["H100"], Binaries(cache, pool))
    binary = cache / "binary.cubin"
    binary.write_bytes(compile_launch(launch, cache / "triton").asm["cubin"])
    usage, code = (subprocess.run([*tool, binary], capture_output=True, text=True, check=True).stdout for tool in (
        [knobs.nvidia.cuobjdump.path, "-res-usage"], [knobs.nvidia.nvdisasm.path, "-c"]))
    shared = compile_launch(launch, cache / "triton").metadata.shared
    number = lambda name: int(re.search(name + r":(\\d+)", usage)[1])
    spills = len(re.findall(r"\\b(?:STL|LDL)\\b", code))
    said = {"REG": number("REG"), "STACK": number("STACK"), "code": spills, "metadata": shared}
    found.append({**kernel.as_dict(), **said})
print(json.dumps(found))
"""
SMALL, LONG = ((5, 5), (4, 3)), ((5, 10), (5, 7))  # ragged windows of 12 tokens, and of 35
CASES = (
    ("group", SMALL, (16, 16, 16, 16, 4, 2)),
    ("forward", LONG, (32, 16, 16, 16, 2, 2)),
    ("queries", LONG, (32, 16, 16, 16, 2, 2)),
    ("keys", LONG, (16, 32, 16, 16, 2, 2)),
)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.slow
def test_figures_are_those_of_the_tools_and_of_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_compiling("-c", REAL, str(tmp_path), json.dumps(CASES))
    assert done.returncode == 0, done.stderr

    asked, seats = dict[int, int](), guard.Memory.seats

    def counting(self: guard.Memory, pointers: guard.Array, mask: guard.Array, what: str) -> guard.Array:
        found = seats(self, pointers, mask, what)
        asked[id(self)] = asked.get(id(self), 0) + int(self.size[found].sum())
        return found

    monkeypatch.setattr(guard.Memory, "seats", counting)
    for (step, (size, window), tile), said in zip(CASES, json.loads(done.stdout), strict=True):
        assert (said["registers"], said["spill_bytes"], said["spill_accesses"]) == (
            said["REG"], said["STACK"], said["code"]
        ), step  # fmt: skip
        assert said["shared"] == said["metadata"]
        problem = Problem(Partition.local(size, window), 24, 40, 2, True, "float16", 1)
        watched = interpreted(problem, step, Tile(*tile))
        (memory,) = watched.launches
        assert said["bytes_asked"] == pytest.approx(asked[id(memory)]), step
        assert said["bytes_distinct"] == watched.traffic(), step
        assert said["flops_done"] >= said["flops_asked"] * 0.999


def interpreted(problem: Problem, step: str, tile: Tile) -> guard.Watch:
    """One kernel's memory."""
    tensors = Tensors(problem, lambda x: torch.randn(x.shape).to(x.dtype))
    with guard.watch() as watched:
        if step == "forward":
            tensors.forward(tile, with_lse=False)
        else:
            tiles = Task(H100, problem, step).backward(tile)
            tensors.backward(tiles, tensors.partials(tiles))
    name = f"{step if step == 'forward' else f'backward_{step}'}_kernel"
    watched.launches = [memory for memory in watched.launches if memory.kernel == name]
    return watched
