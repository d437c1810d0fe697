"""The tests of the kernels can fail: each defect that such kernels are known for, planted in a copy, makes them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COPIED = ("isa_triton", "reference", "bench", "tests", "pyproject.toml")


@dataclass(frozen=True)
class Defect:
    name: str
    file: str
    right: str
    wrong: str
    tests: str = "generated_case and local and (3.5 or 5.3)"  # which of tests/test_kernels.py see it


DEFECTS = (
    Defect("mask off by one", "kernels/common.py", "(number < h.tokens", "(number <= h.tokens"),
    Defect("h and w exchanged", "partition.py", "(token // w.tokens)", "(token // h.tokens)"),
    Defect(
        "stride of the wrong tensor",
        "kernels/launch.py",
        "_pixels(v), _pairs(bias)",
        "Pixels(v, *_pixels(k)[1:]), _pairs(bias)",
    ),
    Defect("masked columns not zeroed", "kernels/common.py", 'tl.where(key.inside, score, float("-inf"))', "score"),
    Defect(
        "int32 offset",
        "kernels/common.py",
        "tokens.y.to(tl.int64) * pixels.y + tokens.x.to(tl.int64) * pixels.x",
        "tokens.y * pixels.y + tokens.x * pixels.x",
        "offsets and row",
    ),
    Defect("wrong lse", "kernels/forward.py", "row_max * LN_2", "row_max"),
    Defect(
        "bias transposed",
        "kernels/common.py",
        "query.number.to(tl.int64) * numbers.query\n    column = key.number",
        "key.number.to(tl.int64) * numbers.query\n    column = query.number",
    ),
    Defect("dv from unnormalised p", "kernels/backward.py", "tl.dot(p.to(do_chunk", "tl.dot(weight.to(do_chunk"),
    Defect(
        "tail group skipped",
        "kernels/launch.py",
        "maps * partition.groups *",
        "maps * (partition.groups - 1) *",
    ),
    Defect("delta of the wrong row", "kernels/backward.py", "(dp - delta[:, None])", "(dp - delta[None, :])"),
    Defect(
        "old sum not shrunk",
        "kernels/common.py",
        "row_sum * shrink",
        "row_sum",
        "generated_case and local and 5.10",
    ),
    Defect("halves exchanged", "kernels/backward.py", "low | (high << 16)", "high | (low << 16)", "whole"),
    Defect("pixels before the map", "partition.py", "inside & (y >= 0) & (x >= 0)", "inside", "shifted"),
    Defect("dlse forgotten", "kernels/backward.py", "delta -= one_each", "delta -= 0 * one_each"),
)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_planted_defect_is_found(defect: Defect, tmp_path: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.png"))
        else:
            shutil.copy(source, tmp_path / name)
    file = tmp_path / "isa_triton" / defect.file.replace("kernels/", "backend/kernels/")
    text = file.read_text()
    assert defect.right in text, "the code has changed: plant the defect anew"
    file.write_text(text.replace(defect.right, defect.wrong))
    command = ["-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/test_kernels.py", "-k"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, *command, defect.tests], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 1, run.stdout[-2000:] + run.stderr[-2000:]
    assert " failed" in run.stdout
