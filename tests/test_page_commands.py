"""Every command that a page names runs to its last output, scaled down by what `SMALL` adds to it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import main
from tests import segmentation_data
from tests.house import ROOT
from tests.test_pages import COMMANDS

WIDTHS = "--channels 16 --key-channels 8 --value-channels 16"
SURVEY = f"--partition-size 2 {WIDTHS} --rounds 1 --passes forward --longest-call 5"
TRAIN = "--device cpu --workers 0"
LEARN = f"{TRAIN} --backbone resnet50 --weights none --channels 16 --crop 64 --batch 2 --iterations 1 --dtype float32"
# What makes a command small that begins so, its longest beginning; of an option that comes twice the last one counts.
SMALL = {
    "scaling": f"--sizes 8 --providers dense-sdpa isa {SURVEY}",
    "partitions": f"--size 8 --partition-sizes 2 {SURVEY}",
    "accuracy": "--experiments keys --networks none ISA --seeds 1 --steps 2 --workers 1",
    "train": LEARN,
    "train --data cityscapes/ --evaluate": TRAIN,
    "train --data data/ --data-set folder --check": "",
    "predict": "--device cpu",
    "inference": f"--sizes 8 --rounds 1 {WIDTHS}",
    "norm": "--sizes 17x20 --channels 16 --rounds 1",
    "photograph": "--sizes 33x49 --rounds 1",
    "sharding": "--size 16 --channels 16 --partition-size 2 --rounds 1 --devices 1 2 --simulated-sizes 64",
    "check": "--backends eager --cases 5",
    "check --device ptx:sm_90": "--first 1 --jobs 1",
    "check --device ptx:sm_100 --shipped": "--first 1 --jobs 1",
    "check --device ptx:sm_80 --first 4 --mutants 60": "--first 1 --mutants 2 --jobs 1",
}
# Whom others run as they stand: they take no options, or binaries that need no compiler.
ELSEWHERE = {
    "certify": "test_bench_certify.py",
    "overhead": "test_launches.py",
    "models": "test_bench_models.py",
    "paper": "test_bench_paper.py",
    "pictures": "test_bench.py",
    "tiles": "test_bench_tile_search.py",
}
LINES = list(dict.fromkeys(shlex.join(words) for _, words in COMMANDS if words[0] not in ELSEWHERE))


def small(line: str) -> list[str]:
    """A command with what makes it small."""
    beginnings = [beginning for beginning in SMALL if f"{line} ".startswith(f"{beginning} ")]
    assert beginnings, f"a page names `python -m bench {line}`, which nothing here makes small: add it to SMALL"
    return shlex.split(f"{line} {SMALL[max(beginnings, key=len)]}")


@pytest.mark.parametrize(
    "command",
    [pytest.param(name, marks=[pytest.mark.slow]) for name in dict.fromkeys(line.split()[0] for line in LINES)],
)
def test_every_command_on_a_page_runs_to_its_last_output(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if command in ("train", "predict"):
        segmentation_data.cityscapes(tmp_path / "cityscapes")
        segmentation_data.own(tmp_path / "data", counts=(3, 1))
        shutil.copytree(tmp_path / "data/images/val", tmp_path / "photographs")
    if command == "predict":  # what a page trains first, in the place of all that it trains
        (line,) = (line for line in LINES if line.endswith("--out runs/own"))
        main(small(line))
    for line in LINES:
        if line.split()[0] == command:
            main(small(line))
            if line.endswith("--check"):
                assert "4 pairs of images and labels are in order." in capsys.readouterr().out
                continue
            *_, last = re.split(r"Wrote\s+", capsys.readouterr().out)
            assert all(Path(path).stat().st_size for path in last.splitlines()[0].split(", ")), line


@pytest.mark.parametrize(("command", "file"), ELSEWHERE.items())
def test_what_is_run_elsewhere_is(command: str, file: str) -> None:
    test = (ROOT / "tests" / file).read_text()
    assert f'"{command}"' in test, f"{file} runs no {command}"


def test_a_command_that_nothing_makes_small_is_named() -> None:
    with pytest.raises(AssertionError, match="`python -m bench fly --far`"):
        small("fly --far")


@pytest.mark.slow
def test_torch_is_silent_about_a_machine_without_a_gpu(tmp_path: Path) -> None:
    code = f"from bench.__main__ import main; main({small('inference')}); import torch.utils.cpp_extension"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_HOME": "/", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("Every row goes to ")
