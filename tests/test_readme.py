"""The front page is true: its example runs, its pictures exist, its commands are the ones CI runs."""

from __future__ import annotations

import re
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


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_ci_finds_the_test_command() -> None:
    (command,) = re.findall(r"<!-- tests -->\n```sh\n(.*?)\n```", README, re.DOTALL)
    assert command == "pip install -e '.[test]' && pytest"
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()
