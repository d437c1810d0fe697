"""Kernels of somebody else's under the workbench's lens: what they ask for is counted from their code alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from tests.compiling import run_compiling

KERNELS = """
import triton
import triton.language as tl


@triton.jit
def scale_rows(x, factor, out, columns, BLOCK: tl.constexpr, row_factor=1.0):
    row = tl.program_id(1)
    by = tl.load(factor + row) * row_factor
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        at = row * columns + column
        tl.store(out + at, by * tl.load(x + at, column < columns), column < columns)


@triton.autotune([triton.Config({"BM": 64, "BN": 64, "BK": 32})], key=["K"])
@triton.jit
def lower(a, b, c, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(2) * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for start in range(0, (tl.program_id(2) + 1) * K, BK):
        k = start + tl.arange(0, BK)
        acc = tl.dot(tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :]), acc)
    tl.store(c + m[:, None] * N + n[None, :], acc.to(c.dtype.element_ty))


@triton.jit
def ragged(x, lengths, out):
    total = 0.0
    for i in range(0, tl.load(lengths + tl.program_id(0))):
        total += tl.load(x + i)
    tl.store(out + tl.program_id(0), total)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "theirs.py").write_text(KERNELS)
    return tmp_path / "theirs.py"


def reported(file: Path, name: str, *words: str) -> dict[str, Any]:
    out = file.parent / "report.json"
    command = ["-m", "bench", "tiles", "report", "--kernel", f"{file}:{name}", "--cache", str(file.parent)]
    done = run_compiling(*command, "--json", str(out), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(out.read_text())
    assert f"PREDICTED {1e6 * found['predicted_seconds']:.1f} us" in done.stdout
    return dict(found)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_scalars_rows_and_masked_lanes_are_counted(target: str, file: Path) -> None:
    tensors = ["x=fp32[300,1000]", "out=fp32[300,1000]", "factor=fp32[300]"]
    found = reported(file, "scale_rows", "--target", target, "--arguments", *tensors, "columns=1000", "BLOCK=256",
                     "--grid", "1", "300", "--options", "num_warps=2")  # fmt: skip
    assert found["programs"] == 300
    assert found["bytes_asked"] == 4 * (2 * 300 * 1024 + 300)  # of a row four blocks, masked or not
    assert found["bytes_distinct"] == 4 * (2 * 300 * 1000 + 300)
    assert found["flops_asked"] == 0
    assert found["tile"] == {"BLOCK": 256, "row_factor": 1.0, "num_warps": 2, "num_stages": 3}
    assert found["warps"] == 2


@pytest.mark.slow
def test_loops_run_as_often_as_the_mean_program_of_a_grid_of_three_axes(file: Path) -> None:
    tensors = ["a=bf16[192,384]", "b=bf16[384,128]", "c=bf16[192,128]"]
    found = reported(file, "lower", "--arguments", *tensors, "N=128", "K=128", "BM=64", "BN=64", "BK=32",
                     "--grid", "3", "1", "2")  # fmt: skip
    trips = (4 + 8) / 2  # those of two columns of programs
    assert found["flops_asked"] == 6 * trips * 2 * 64 * 64 * 32
    assert found["bytes_asked"] == 6 * 2 * (trips * (64 * 32 + 32 * 64) + 64 * 64)
    assert found["flops_done"] == found["flops_asked"]


@pytest.mark.slow
def test_what_is_only_known_when_it_runs_is_said(file: Path) -> None:
    words = ["--arguments", "x=fp32[9]", "lengths=i32[9]", "out=fp32[9]", "--cache", str(file.parent)]
    done = run_compiling("-m", "bench", "tiles", "report", "--kernel", f"{file}:ragged", *words)
    assert done.returncode == 2
    assert "a loop of ragged runs as often as" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--kernel nowhere.py:f", "nowhere.py is no Python file"),
        ("--kernel FILE:missing", "has no kernel 'missing', but lower, ragged, scale_rows"),
        ("--kernel FILE:ragged --arguments x=fp32[9] y=3", "ragged takes x, lengths, out, not y"),
        ("--kernel FILE:ragged --arguments x=fp32[9]", "ragged needs lengths, out as well"),
        ("--kernel FILE:ragged --arguments x=fp99[9]", "tensors are fp64"),
        ("--kernel FILE:ragged --arguments x", "must be NAME=VALUE"),
        ("--kernel FILE", "must be FILE:NAME"),
        ("--kernel FILE:ragged --grid 1 2 3 4", "--grid must be one to three positive numbers"),
        ("--kernel FILE:ragged --tokens 64", "takes no --tokens"),
        ("--kernel FILE:ragged --pass backward", "takes no --pass"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: str, named: str, file: Path, capsys: pytest.CaptureFixture[str], compiling: None
) -> None:
    with pytest.raises(SystemExit):
        main(["tiles", "report", *arguments.replace("FILE", str(file)).split()])
    assert named in capsys.readouterr().err.replace("\n", " ")
