"""``python -m tests.mutations [WORD ...]`` plants mistakes: it puts each in a copy and runs the tests that guard it.

Without words all are planted, one at a time; with some, those whose name or file holds one of them. A test has to fail:
what none sees has survived, and the command ends with 1 unless the list argues why it may. A line each, then the sum.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path

import pytest

from tests.mutations import of_kernels, of_networks, of_the_library
from tests.mutations.defect import Defect
from tests.processes import fresh_processes

ROOT = Path(__file__).parent.parent.parent
COPIED = ("isa_triton", "reference", "bench", "tests", "pyproject.toml")
LONGEST = 300.0  # seconds that a test may take: a mistake may be that it never ends
REPORT = "report.xml"
DEFECTS = (*of_kernels.KNOWN, *of_kernels.OTHERS, *of_the_library.DEFECTS, *of_networks.DEFECTS)


def copy_to(folder: Path) -> None:
    """The checkout, less what measurements have left."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            shutil.copy(source, folder / name)


@contextmanager
def planted(defect: Defect, folder: Path) -> Iterator[None]:
    """The copy with a defect, and then without it."""
    file = folder / defect.file
    text = file.read_text()
    if text.count(defect.right) != 1:
        raise ValueError(f"{defect.file} must hold {defect.right!r} once: it has changed, plant {defect.name!r} anew")
    _write(file, text.replace(defect.right, defect.wrong))
    try:
        yield
    finally:
        _write(file, text)


def _write(file: Path, text: str) -> None:
    file.write_text(text)
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):  # whose time and size may be the same
        compiled.unlink()


def outcome(folder: Path, tests: Sequence[str]) -> int | None:
    """How pytest ends in a new process, into which nothing of ours was imported yet; None if it does not."""
    plugins = ["-p", "no:cacheprovider", "-p", "no:terminal", f"--junitxml={folder / REPORT}"]
    arguments = ["-n", "0", "-x", *plugins, *(f"{folder}/tests/{test}" for test in tests)]
    with ProcessPoolExecutor(1, mp_context=fresh_processes()) as pool:
        ended = pool.submit(pytest.main, arguments)
        try:
            return ended.result(LONGEST * len(tests))
        except TimeoutError:
            for child in active_children():
                child.kill()
            return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the names or files of those to plant")
    words = parser.parse_args(arguments).words
    chosen = [d for d in DEFECTS if not words or any(word in f"{d.name} {d.file}" for word in words)]
    if not chosen:
        parser.error(f"{' and '.join(words)} must be part of a name or file, and is of none of {len(DEFECTS)}")
    os.environ["TRITON_INTERPRET"] = "1"  # what new processes begin with is Triton, which asks when it is imported
    begin, left = time.perf_counter(), list[Defect]()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_to(folder)
        tests = sorted({test for defect in chosen for test in defect.tests})
        if outcome(folder, tests) != pytest.ExitCode.OK:
            print((folder / REPORT).read_text(), "The tests fail without a defect.", sep="\n")
            return 2
        for defect in chosen:
            start = time.perf_counter()
            with planted(defect, folder):
                ended = outcome(folder, defect.tests)
            killed = ended in (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED, None)
            left += [] if killed else [defect]
            how = "killed  " if killed else "argued  " if defect.argued else "SURVIVED"
            seconds = time.perf_counter() - start
            print(
                f"{how} {seconds:5.1f} s  {defect.file}: {defect.name}  {defect.argued * (not killed)}".rstrip(),
                flush=True,
            )
    unargued = [defect.name for defect in left if not defect.argued]
    print(
        f"{len(chosen)} defects in {len({d.file for d in chosen})} files: {len(chosen) - len(left)} killed,"
        f" {len(left)} survived, {len(left) - len(unargued)} of them argued; {time.perf_counter() - begin:.0f} s"
    )
    return 1 if unargued else 0


if __name__ == "__main__":
    sys.exit(main())
