"""The tests of the kernels can fail: each defect that such kernels are known for, planted in a copy, fails one.

`python -m tests.mutations` plants these and others all over the library; here is also that it can.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutations.__main__ import DEFECTS, REPORT, ROOT, copy_to, outcome, planted
from tests.mutations.defect import Defect
from tests.mutations.of_kernels import KNOWN


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_what_a_defect_replaces_is_there_once(defect: Defect) -> None:
    text = (ROOT / defect.file).read_text()
    assert text.count(defect.right) == 1, "the code has changed: plant the defect anew"
    assert text != text.replace(defect.right, defect.wrong)


def test_the_list_is_long_and_says_each_once() -> None:
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS) >= 60
    missing = {test for d in DEFECTS for test in d.tests if not (ROOT / "tests" / test.partition("::")[0]).exists()}
    assert missing == set()


@pytest.mark.slow
def test_without_a_defect_all_of_these_tests_pass(tmp_path: Path) -> None:
    copy_to(tmp_path)
    ended = outcome(tmp_path, sorted({test for defect in KNOWN for test in defect.tests}))
    assert ended == pytest.ExitCode.OK, (tmp_path / REPORT).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("defect", KNOWN, ids=lambda defect: defect.name)
def test_a_planted_defect_is_found(defect: Defect, tmp_path: Path) -> None:
    copy_to(tmp_path)
    with planted(defect, tmp_path):
        ended = outcome(tmp_path, defect.tests)
    assert ended == pytest.ExitCode.TESTS_FAILED, (tmp_path / REPORT).read_text()
