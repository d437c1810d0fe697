"""Kernels with a known defect, compiled and executed: the machine says what is wrong where a GPU might say nothing.

Defects of the source are planted in a copy, whose own tests then run with `--device ptx:sm_80`; one that a compiler
would make, a ring of copies a buffer too short, is planted in what it writes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.compiling import run_compiling
from tests.mutations.__main__ import copy_to
from tests.mutations.of_kernels import NAMED

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Defect:
    name: str
    right: str
    wrong: str
    said: str  # by the machine, or by the error budget
    test: str = "windows on a ragged map"  # which sees it


COMMON = "isa_triton/backend/kernels/common.py"
DEFECTS = (
    Defect("the mask of a load dropped", "return tl.load(pointer, exists, other=0.0)", "return tl.load(pointer)",
           "Fault: forward_group_kernel: global memory: outside every tensor: cp.async"),
    Defect("the mask of a store dropped", "values.to(rows.pointer.dtype.element_ty), exists)",
           "values.to(rows.pointer.dtype.element_ty))", "global memory: outside every tensor: "),
    Defect("rows of an asynchronous copy too far apart", "start * pixels.unit + offset * pixels.unit",
           "start * pixels.unit + 2 * offset * pixels.unit",
           "Fault: forward_kernel: global memory: outside every tensor: cp.async", "wide heads"),
)  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_defect_of_the_source_is_found(defect: Defect, tmp_path: Path) -> None:
    copy_to(copied := tmp_path)
    file = copied / COMMON
    text = file.read_text()
    assert defect.right in text, "the code has changed: plant the defect anew"
    file.write_text(text.replace(defect.right, defect.wrong))
    test = f"tests/{NAMED}[{defect.test}]"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(copied), "COLUMNS": "200"}
    command = [sys.executable, "-m", "pytest", "--device", "ptx:sm_80", test, "-n0", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=copied)
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    assert defect.said in done.stdout, done.stdout


SHORTER = r"""
import re
from dataclasses import replace
from bench.ptx_machine import check
from bench.ptx_machine.driver import installed
from bench.ptx_machine.faults import Fault
from bench.ptx_machine.problems import cases

RING = r"(setp\.gt\.s32\s+(%p\d+), (%r\d+), )(\d+)(;\s+selp\.b32\s+%r\d+, 0, \3, \2;)"
(work,) = [work for work in cases("sm_80") if work.arithmetic == "float16" and "8x8" in work.name]
with installed(work.target) as device:
    for count in (0, 1):
        rings = []
        def shorter(text):
            rings.append(len(re.findall(RING, text)))
            return re.sub(RING, lambda m: f"{m[1]}{int(m[4]) - count}{m[5]}", text)
        device.change = shorter
        try:
            print(max(check.errors(work).values()) <= 1, rings)
        except Fault as fault:
            print(fault)
"""


def test_a_stage_too_few_is_found() -> None:
    done = run_compiling("-c", SHORTER)
    assert done.returncode == 0, done.stderr
    right, wrong = done.stdout.splitlines()
    assert right.startswith("True [4, 4, 6")
    assert wrong.startswith("forward_group_kernel: shared memory: ")
