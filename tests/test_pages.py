"""The front page is true: its example runs, its pictures exist, its commands are the ones CI runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_checkpoints import as_published, head_weights

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"<!-- example -->\n```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_run(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = head_weights("conv", "bn", "conv_seg", (2048, 512, 256, 19))
    torch.save({"state_dict": as_published(weights, "mmseg")}, "isanet_r50-d8.pth")  # the file one of them loads
    exec(compile(example, "README.md", "exec"), {})


def test_the_sharded_script_runs_as_printed(tmp_path: Path) -> None:
    (script,) = re.findall(r"<!-- sharded -->\n```python\n(.*?)```", README, re.DOTALL)
    (command,) = re.findall(r"<!-- sharded run -->\n```sh\n(.*?)\n```", README, re.DOTALL)
    assert command == "torchrun --nproc-per-node 2 map.py"
    (tmp_path / "map.py").write_text(script)
    arguments = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "map.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PET_STANDALONE": "1"}  # any port
    run = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )  # its status is not asked: gloo sometimes aborts a process that has ended in good order
    assert "(1, 32, 64, 96) -> (1, 19, 256, 384) of which here (1, 19, 128, 384)" in run.stdout, run.stderr


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_ci_finds_the_test_command() -> None:
    (command,) = re.findall(r"<!-- tests -->\n```sh\n(.*?)\n```", README, re.DOTALL)
    assert command == "pip install -e '.[test]' && pytest"
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()
