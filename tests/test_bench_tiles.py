"""The workbench: the reader on pieces of machine code, the judge on planted violations, and real binaries."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import triton

from bench.__main__ import main
from bench.terminal import Terminal
from bench.tiles.assembly import (
    Instruction,
    access,
    amd_instructions,
    is_atomic,
    matrix_kind,
    sass_instructions,
)
from bench.tiles.binaries import (
    LIMITS,
    Access,
    Binaries,
    Binary,
    accesses,
    amd_metadata,
    ctas_by_resource,
    in_rows,
    violations,
)
from bench.tiles.compile import NOT_SHIPPED, Launch, Problem, compile_launch, format_tile, named
from bench.tiles.options import add_problem, make_problem
from bench.tiles.options import machine as find_machine
from bench.tiles.options import tile as read_tile
from bench.tiles.roofline import MACHINES
from bench.tiles.verify import FP16, SHAPES, TARGETS, launches
from isa_triton import tiles
from isa_triton.backend.kernels import common, forward
from isa_triton.partition import Partition
from isa_triton.tiles import Tile
from tests.compiling import run_compiling

# -- the reader --------------------------------------------------------------------------------------------------------

SASS = """
kernel:
\t//## File "/home/someone/kernels/forward.py", line 35
        /*0000*/                   LDC R1, c[0x0][0x28] ;
\t//## File "/home/someone/kernels/common.py", line 7 inlined at "/home/someone/kernels/forward.py", line 40
        /*0010*/              @!P0 LDGSTS.E.BYPASS.LTC128B.128 [R72], desc[UR14][R32.64], P0 ;
        /*0020*/                   LDG.E.U16 R4, desc[UR14][R2.64] ;
        /*0030*/             @!UP1 LDG.E.64.CONSTANT R4, desc[UR14][R2.64] ;
        /*0040*/                   LDG.E R4, desc[UR14][R2.64] ;
        /*1c50*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*1c60*/                   STG.E.128 desc[UR14][R2.64], R4 ;
        /*1c70*/                   STL.64 [R1], R4 ;
.L_x_0:
"""

AMD = """
\t.file\t1 "/home/someone/kernels" "forward.py"
\t.file\t2 "/home/someone/kernels" "common.py"
\t.loc\t2 7 12                        ; common.py:7:12 @[ forward.py:42:19 ]
\tbuffer_load_dwordx4 v[2:5], v14, s[44:47], 0 offen
\tglobal_load_ushort v1, v[2:3], off
.Ltmp65:
\t.loc\t1 40 12 is_stmt 0
\tv_mfma_f32_32x32x8_bf16 v[2:17], v[38:39], v[32:33], v[2:17]
\tbuffer_store_dwordx2 v[2:3], v14, s[44:47], 0 offen
\ts_endpgm
    .vgpr_count:     151
    .vgpr_spill_count: 3
"""


def test_sass_is_read_with_its_source() -> None:
    code = list(sass_instructions(SASS))
    assert len(code) == 8
    assert code[0] == Instruction("LDC", "forward.py", 35)
    assert code[1] == Instruction("LDGSTS.E.BYPASS.LTC128B.128", "common.py", 7)
    assert [(a.store, a.width, a.times) for a in accesses(code)] == [
        (False, 2, 1), (False, 4, 1), (False, 8, 1), (False, 16, 1), (True, 16, 1)
    ]  # fmt: skip


def test_amd_assembly_is_read_with_its_source() -> None:
    code = list(amd_instructions(AMD))
    assert [i.opcode for i in code][-1] == "s_endpgm"
    assert code[0] == Instruction("buffer_load_dwordx4", "common.py", 7)
    assert code[2] == Instruction("v_mfma_f32_32x32x8_bf16", "forward.py", 40)
    assert [(a.store, a.width) for a in accesses(code)] == [(False, 2), (False, 16), (True, 8)]
    assert (amd_metadata(AMD, "vgpr_count"), amd_metadata(AMD, "vgpr_spill_count")) == (151, 3)
    with pytest.raises(ValueError, match=r"does not say \.agpr_count"):
        amd_metadata(AMD, "agpr_count")


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HMMA.16816.F32.BF16", "HMMA"),
        ("HMMA.1688.F32.TF32", "HMMA.TF32"),
        ("HGMMA.64x256x16.F32", "HGMMA"),
        ("UTCHMMA", "UTCHMMA"),
        ("v_mfma_f32_16x16x16_f16", "mfma"),
        ("v_mfma_f32_16x16x8_xf32", "mfma.xf32"),
        ("v_wmma_f32_16x16x16_f16", "wmma"),
        ("FFMA", None),
        ("UTCBAR", None),
        ("v_fma_f32", None),
    ],
)
def test_matrix_instructions_by_kind(opcode: str, kind: str | None) -> None:
    assert matrix_kind(opcode) == kind


@pytest.mark.parametrize(
    ("opcode", "store", "width"),
    [
        ("global_load_d16_hi_b16", False, 2),
        ("buffer_load_d16_b16", False, 2),
        ("buffer_load_b128", False, 16),
        ("global_load_tr_b128", False, 16),
        ("buffer_store_b64", True, 8),
        ("global_store_d16_hi_b16", True, 2),
    ],
)
def test_accesses_of_rdna_by_width(opcode: str, store: bool, width: int) -> None:
    assert access(opcode) == (store, width)


def test_atomics_are_those_on_global_memory() -> None:
    adding = ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "ATOMG.E.ADD", "global_atomic_add_f32", "buffer_atomic_pk_add_f16")
    harmless = ("REDUX.SUM", "UTCATOMSWS.AND", "ATOMS.ADD", "LDG.E", "SYNCS.ARRIVE")
    assert all(map(is_atomic, adding))
    assert not any(map(is_atomic, harmless))


def test_rows_are_what_the_helpers_of_rows_touch() -> None:
    lines = Path(common.__file__).read_text().splitlines()
    rows = 1 + lines.index("    return tl.load(pointer, exists, other=0.0)")
    bias = 1 + lines.index("    return tl.load(pointer, exists, other=0.0).to(tl.float32)")
    assert in_rows(Instruction("LDG.E", "common.py", rows))
    assert not in_rows(Instruction("LDG.E", "forward.py", rows))
    assert not in_rows(Instruction("LDG.E", "common.py", bias))


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "columns", "ctas", "limiters"),
    [
        ("sm_80", 255, 4, 1024, 0, 2, {"registers"}),
        ("sm_80", 32, 4, 0, 0, 16, {"threads", "registers"}),
        ("sm_80", 64, 4, 80 << 10, 0, 2, {"shared memory"}),
        ("sm_80", 64, 4, 164 << 10, 0, 0, {"shared memory"}),
        ("sm_80", 16, 1, 1024, 0, 32, {"CTAs"}),
        ("sm_90", 168, 4, 48 << 10, 0, 3, {"registers"}),  # of a quarter: 3 warps of 168
        ("sm_100", 64, 4, 1024, 256, 2, {"tensor memory"}),
        ("sm_100", 64, 4, 1024, 1024, 0, {"tensor memory"}),
        ("sm_90", 255, 16, 1024, 0, 0, {"registers"}),
        ("gfx942", 151, 4, 16 << 10, 0, 3, {"registers"}),
        ("gfx942", 512, 4, 0, 0, 1, {"registers"}),
        ("gfx1100", 256, 8, 0, 0, 2, {"registers"}),  # of a quarter: 5 warps of 264
        ("gfx1200", 96, 4, 40 << 10, 0, 3, {"shared memory"}),
        ("gfx1200", 96, 4, 80 << 10, 0, 0, {"shared memory"}),
    ],
)
def test_the_scarcest_resource_limits_the_ctas_per_sm(
    target: str, registers: int, warps: int, shared: int, columns: int, ctas: int, limiters: set[str]
) -> None:
    found = ctas_by_resource(target, registers, warps, shared, columns)
    assert min(found.values()) == ctas
    assert {resource for resource, enough in found.items() if enough == ctas} == limiters


# -- the judge ---------------------------------------------------------------------------------------------------------

WIDE = (Access(False, True, 16, 40), Access(False, False, 4, 2), Access(True, True, 16, 4))
SOUND = Binary(128, 0, 0, 32 << 10, 0, 4, 3, 2000, {"HMMA": 160}, 0, WIDE)


def planted(target: str = "sm_80", dtype: str = "bfloat16", width: int = 64) -> Launch:
    problem = Problem(Partition.local((16, 24), (8, 8)), width, width, dtype=dtype)
    return Launch(target, problem, "m", "kernel", 1, {}, {})


@pytest.mark.parametrize(
    ("change", "where", "named"),
    [
        ({}, {}, None),
        ({"spill_bytes": 8, "spill_accesses": 4}, {}, "spills 8 bytes (4 accesses)"),
        ({"spill_accesses": 4}, {"dtype": "tf32"}, "spills 0 bytes (4 accesses)"),
        ({"spill_bytes": 8, "matrix": {}}, {"dtype": "float32"}, None),
        ({"shared": 200 << 10, "ctas_per_sm": 0}, {}, "wants 204800 bytes of shared memory, there are 166912"),
        ({"tensor_columns": 1024, "ctas_per_sm": 0}, {"target": "sm_100"}, "wants 1024 columns of tensor memory"),
        ({"ctas_per_sm": 0}, {}, "not one CTA of 4 warps with 128 registers fits"),
        ({"accesses": (), "matrix": {}}, {}, "an empty or trapping kernel"),
        ({"matrix": {}}, {}, "without the matrix units"),
        ({"matrix": {}}, {"dtype": "tf32"}, "without the matrix units"),
        ({"matrix": {}}, {"dtype": "float32", "target": "gfx942"}, "without the matrix units"),
        ({"matrix": {"HMMA.TF32": 8}}, {"dtype": "float32"}, "multiplies fp32 as tf32"),
        ({"matrix": {"mfma": 8}}, {"dtype": "float32", "target": "gfx942"}, None),
        ({"matrix": {}}, {"dtype": "float32", "target": "gfx1100"}, None),
        ({"matrix": {}}, {"target": "gfx1100"}, "without the matrix units"),
        ({"matrix": {"wmma": 8}}, {"dtype": "float32", "target": "gfx1200"}, "multiplies fp32 as tf32"),
        ({"atomics": 2}, {}, "2 atomic instructions"),
        ({"accesses": (*WIDE, Access(False, True, 8, 3))}, {}, "loads rows 8x3 bytes at a time"),
        ({"accesses": (*WIDE, Access(False, True, 2, 3))}, {"width": 39}, None),
    ],
)
def test_violations_are_found(change: dict[str, object], where: dict[str, object], named: str | None) -> None:
    found = violations(planted(**where), replace(SOUND, **change))
    assert (found == []) if named is None else (len(found) == 1 and named in found[0])


class Named(Launch):
    """Its binary depends on its name only."""

    key = label = property(lambda self: self.name)


class Compilers:
    """Finds that "bad" does not compile."""

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def submit(self, _: Any, launch: Launch, *__: Any) -> Future[Any]:
        self.compiled.append(launch.name)
        done: Future[Any] = Future()
        done.set_result("does not compile: Why" if launch.name == "bad" else SOUND)
        return done


def test_launches_with_one_binary_share_it_and_one_that_does_not_compile_has_a_violation(tmp_path: Path) -> None:
    pool = Compilers()
    launches = [Named(*planted()._replace(name=name)) for name in ("good", "bad", "good")]
    with Terminal().progress("binaries") as bar:
        found = Binaries(tmp_path, pool, bar=bar).verdicts(launches)
        assert bar.progress.tasks[0].completed == bar.progress.tasks[0].total == 2
    assert [verdict.launch for verdict in found] == launches
    assert [(verdict.binary, verdict.violations) for verdict in found] == [
        (SOUND, []), (None, ["does not compile: Why"]), (SOUND, [])
    ]  # fmt: skip
    assert sorted(pool.compiled) == ["bad", "good"]


def test_shapes_are_the_promised_ones() -> None:
    tokens = {(s.key_width, s.value_width, s.bias): set[int]() for s in SHAPES.values()}
    for s in SHAPES.values():
        tokens[s.key_width, s.value_width, s.bias].add(s.partition.tokens)
    assert tokens == {
        (256, 512, False): {64, 128, 256, 512, 1024},
        (64, 64, False): {64, 256, 1024},
        (32, 32, True): {49, 64, 144, 256, 392},
        (16, 16, True): {343},
        (8, 8, True): {216},
        (39, 39, True): {49},
        (256, 256, False): {16384},
    }
    assert set(FP16) <= set(SHAPES)
    volumes = {s.partition.tokens: s for s in SHAPES.values() if len(s.partition) == 3}
    assert set(volumes) == {144, 216, 343, 392}
    assert all(axis.token_stride == 1 for s in volumes.values() for axis in s.partition)


# -- tiles -------------------------------------------------------------------------------------------------------------


def test_a_tile_is_read_as_it_is_written() -> None:
    tile = Tile(128, 64, 32, 16, 8, 3)
    assert format_tile(tile) == "BLOCK_M=128,BLOCK_N=64,BLOCK_K=32,BLOCK_V=16,num_warps=8,num_stages=3"
    assert read_tile(format_tile(tile)) == tile._asdict()
    assert read_tile("num_warps=4,BLOCK_N=256") == {"num_warps": 4, "block_n": 256}
    assert read_tile("shipped") == {}


@pytest.mark.parametrize(
    "text",
    ["", "64 64 64 64 4 2", "BLOCK_M=48", "BLOCK_M=8", "num_warps=3", "num_stages=0", "BLOCK=64", "num_warps=-4"],
)
def test_what_is_no_tile_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(repr(text))):
        read_tile(text)


def test_a_launch_says_its_tile_and_where_it_comes_from() -> None:
    def launched(tokens: int, tile: Tile) -> Launch:
        names, problem = forward.forward_kernel.arg_names, make_problem(tokens, 48, 48)
        arguments = {name: n for name, n in named(tile).items() if name in names}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        return Launch("sm_90", problem, forward.__name__, "forward_kernel", 1, arguments, options)

    for tokens, origin in ((49, "its own entry"), (144, "the entry of sm_90, K = 64, V = 64, 144 tokens")):
        tile = tiles.lookup("sm_90", "forward", 48, 48, "bfloat16", tokens, bias=False)
        assert launched(tokens, tile).tile == tile
        assert launched(tokens, tile).origin == origin
        assert launched(tokens, tile._replace(num_stages=5)).origin == NOT_SHIPPED


def test_a_gpu_has_its_target_and_a_target_its_gpu() -> None:
    def machine(*words: str) -> tuple[str, str]:
        parser = argparse.ArgumentParser()
        add_problem(parser)
        found = find_machine(parser.parse_args(words))
        return found.name, found.target

    assert machine() == ("H100", "sm_90")
    assert machine("--target", "sm_86") == ("A10", "sm_86")
    assert machine("--gpu", "H200") == ("H200", "sm_90")
    assert machine("--gpu", "MI300X", "--target", "gfx942") == ("MI300X", "gfx942")
    assert machine("--target", "gfx1100") == ("RX7900XTX", "gfx1100")


def test_every_target_with_tiles_can_be_verified_and_reported_on() -> None:
    shipped = {path.stem for path in tiles.FOLDER.glob("*.json")}
    assert shipped <= set(LIMITS)
    assert shipped == {machine.target for machine in MACHINES.values()}
    assert shipped <= {*TARGETS} <= set(LIMITS)


# -- real binaries, in processes that compile --------------------------------------------------------------------------


@pytest.mark.usefixtures("interpreter")
def test_an_interpreting_process_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tiles", "verify"])
    assert "TRITON_INTERPRET=1 interprets them" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        compile_launch(launches(["sm_80"], [SHAPES["ISA 64"]], ["bfloat16"])[0], Path())


@pytest.mark.slow
def test_shipped_binaries_are_sound_and_known_the_second_time(tmp_path: Path) -> None:
    options = ["--cache", str(tmp_path / "cache"), "--json", str(tmp_path / "all.json"), "--jobs", "1"]
    chosen = ["--targets", "sm_90", "sm_100", "gfx942", "--shapes", "ISA 64", "--dtypes", "bfloat16"]
    command = ["-m", "bench", "tiles", "verify", *chosen, *options]
    done = run_compiling(*command, "--dump", str(tmp_path / "dump"))
    assert done.returncode == 0, done.stdout + done.stderr
    by = f"with triton {triton.__version__}"
    assert [line.partition(" (")[0] for line in done.stdout.splitlines() if "spills:" in line] == [
        f"{target} {by}: 2 binaries, 0 with a violation" for target in ("sm_90", "sm_100", "gfx942")
    ]
    assert f"6 binaries {by}, 0 with a violation" in done.stdout
    rows = json.loads((tmp_path / "all.json").read_text())
    assert len(rows) == 6
    for row in rows:
        kind = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "mfma"}[row["target"]]
        assert kind in row["matrix"]
        assert row["spill_bytes"] == row["spill_accesses"] == row["atomics"] == 0
        assert row["ctas_per_sm"] >= 1
        assert (row["tensor_columns"] > 0) == (row["target"] == "sm_100")
    assert len(list((tmp_path / "dump" / "sm_90").glob("ISA-64-bfloat16-*.cubin"))) == 2
    assert len(list((tmp_path / "dump" / "sm_90").glob("*.sass"))) == 2
    assert len(list((tmp_path / "dump" / "gfx942").glob("*.amdgcn"))) == 2

    shutil.rmtree(tmp_path / "cache" / "triton")
    again = run_compiling(*command)
    assert again.returncode == 0
    assert not (tmp_path / "cache" / "triton").exists()  # nothing was compiled
    assert again.stdout.splitlines()[1:-1] == done.stdout.splitlines()[1:-1]  # but for what was written, and where


PLANT = """
import sys
from bench.__main__ import main
from bench.terminal import Terminal
from bench.tiles import verify
from bench.tiles.compile import forward_launches
from isa_triton.tiles import Tile

def spilling(target, problem, pass_, training=False):
    return forward_launches(target, problem, Tile(64, 64, 64, 64, num_warps=1))

def main_():
    verify.pass_launches = spilling
    main(["tiles", "verify", "--targets", "sm_80", "--shapes", "heads 64", "--dtypes", "bfloat16", *sys.argv[1:]])

if __name__ == "__main__":
    main_()
"""


@pytest.mark.slow
def test_a_spilling_tile_fails(tmp_path: Path) -> None:
    script = tmp_path / "plant.py"
    script.write_text(PLANT)
    done = run_compiling(str(script), "--cache", str(tmp_path / "cache"), "--jobs", "1")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "sm_80, heads 64, bfloat16, forward_group_kernel: spills" in done.stdout
