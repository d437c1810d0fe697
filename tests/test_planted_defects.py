"""The tests of the kernels can fail: each defect that such kernels are known for, planted in a copy, fails one."""

from __future__ import annotations

import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import fresh_processes

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
COPIED = ("isa_triton", "reference", "bench", "tests", "pyproject.toml")
NAMED = "test_kernels.py::test_a_named_case_keeps_the_budget"
KEYLESS = "test_rows_without_keys.py::test_the_same_in_kernels_of_every_form"


@dataclass(frozen=True)
class Defect:
    name: str
    file: str
    right: str
    wrong: str
    test: str = f"{NAMED}[windows]"  # which sees it


DEFECTS = (
    Defect("mask off by one", "backend/kernels/common.py", "(number < tokens_of(axes)", "(number <= tokens_of(axes)"),
    Defect("h and w exchanged", "partition.py", "token // last.tokens", "token // axes[0].tokens"),
    Defect(
        "stride of the wrong tensor",
        "backend/kernels/plan.py",
        "zip(names, layouts, strict=True)",
        "zip(names, (*layouts[:2], layouts[1], *layouts[3:]), strict=True)",
        f"{NAMED}[values of one channel]",
    ),
    Defect(
        "masked columns not zeroed", "backend/kernels/common.py", 'tl.where(key.inside, score, float("-inf"))', "score"
    ),
    Defect(
        "int32 offset",
        "backend/kernels/common.py",
        "tokens.pixel[0].to(tl.int64) * pixels.axes[0]",
        "tokens.pixel[0] * pixels.axes[0]",
        "test_kernel_limits.py::test_offsets_may_exceed_31_bits[row-one block]",
    ),
    Defect("wrong lse", "backend/kernels/common.py", "row_max * (1.0 / unit(bias))", "row_max"),
    Defect(
        "bias transposed",
        "backend/kernels/common.py",
        "query.number.to(tl.int64) * numbers.query\n    column = key.number",
        "key.number.to(tl.int64) * numbers.query\n    column = query.number",
        f"{NAMED}[a bias]",
    ),
    Defect(
        "dv from unnormalised p", "backend/kernels/backward.py", "tl.dot(p.to(do_chunk", "tl.dot(weight.to(do_chunk"
    ),
    Defect(
        "tail group skipped",
        "backend/kernels/plan.py",
        "items = maps * partition.groups\n    if",
        "items = maps * (partition.groups - 1)\n    if",
    ),
    Defect("delta of the wrong row", "backend/kernels/backward.py", "(dp - delta[:, None])", "(dp - delta[None, :])"),
    Defect(
        "old sum not shrunk",
        "backend/kernels/common.py",
        "row_sum * shrink",
        "row_sum",
        f"{NAMED}[windows of many blocks]",
    ),
    Defect(
        "halves exchanged",
        "backend/kernels/backward.py",
        "low | (high << 16)",
        "high | (low << 16)",
        f"{NAMED}[wide heads]",
    ),
    Defect(
        "pixels before the map",
        "partition.py",
        "inside & (y >= 0) & (x >= 0)",
        "inside",
        f"{NAMED}[shifted windows]",
    ),
    Defect(
        "nothing divided by nothing",
        "backend/kernels/common.py",
        "tl.maximum(row_sum, 1.0, propagate_nan=tl.PropagateNan.ALL)[:, None]",
        "row_sum[:, None]",
        f"{KEYLESS}[torch.float32-one block]",
    ),
    Defect(
        "lse of minus infinity subtracted",
        "backend/kernels/backward.py",
        'tl.where(lse_m == float("-inf"), float("inf"), lse_m)',
        "lse_m",
        f"{KEYLESS}[torch.float32-many blocks]",
    ),
    Defect(
        "scores in another unit than their exponentials",
        "backend/kernels/common.py",
        "LOG2_E if bias is None else LOG2_E / 2",
        "LOG2_E",
        f"{NAMED}[a bias]",
    ),
    Defect(
        "p beyond 1",
        "backend/kernels/backward.py",
        "tl.exp2(exponent) if bias is None else at_most_one(exponent, bias)",
        "exp(exponent, bias)",
        "test_rows_without_keys.py::test_scores_that_rounding_moves_by_hundreds_give_finite_gradients[many blocks]",
    ),
    Defect("dlse forgotten", "backend/kernels/backward.py", "delta -= one_each", "delta -= 0 * one_each"),
)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


def outcome(folder: Path, tests: list[str]) -> int:
    """How pytest ends in a new process, into which nothing of ours was imported yet; its report is printed."""
    report, plugins = folder / "report.xml", ["-p", "no:cacheprovider", "-p", "no:terminal"]
    arguments = ["-n", "0", *plugins, f"--junitxml={report}", *(f"{folder}/tests/{test}" for test in tests)]
    with ProcessPoolExecutor(1, mp_context=fresh_processes()) as pool:
        ended = pool.submit(pytest.main, arguments).result()
    print(report.read_text() if report.exists() else "no report")
    return ended


def test_without_a_defect_all_of_these_tests_pass(copied: Path) -> None:
    assert outcome(copied, sorted({defect.test for defect in DEFECTS})) == pytest.ExitCode.OK


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_planted_defect_is_found(defect: Defect, copied: Path) -> None:
    file = copied / "isa_triton" / defect.file
    text = file.read_text()
    assert defect.right in text, "the code has changed: plant the defect anew"
    file.write_text(text.replace(defect.right, defect.wrong))
    assert outcome(copied, [defect.test]) == pytest.ExitCode.TESTS_FAILED
