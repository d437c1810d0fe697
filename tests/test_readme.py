"""The front page is true: its example runs, its pictures exist, its commands are the ones CI runs."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_runs() -> None:
    (example,) = re.findall(r"<!-- example -->\n```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})


def test_linked_files_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_ci_finds_the_test_command() -> None:
    (command,) = re.findall(r"<!-- tests -->\n```sh\n(.*?)\n```", README, re.DOTALL)
    assert command == "pip install -e '.[test]' && pytest"
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()
