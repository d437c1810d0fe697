"""The pages are true: examples run, print what stands there and name what they need; links exist, commands parse."""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench import __main__ as bench
from tests.test_checkpoints import as_published, batch_norm, head_weights, kernel, openseg_weights

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NAMES = [
    "README.md",
    "bench/README.md",
    "isa_triton/backend/kernels/README.md",
    "isa_triton/models/README.md",
    "isa_triton/sharding/README.md",
    ".github/CONTRIBUTING.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / ".docs/recipes").glob("*.md")),
]
PAGES = {name: (ROOT / name).read_text() for name in NAMES}

# Every example, and what it prints where the page says so; a script for several processes has a test of its own.
EXAMPLE = re.compile(r"(?<!<!-- sharded -->\n)```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.DOTALL)
SLOW = re.compile(r"onnx\.export|torch\.compile")
EXAMPLES = [
    pytest.param(name, *example, marks=[pytest.mark.slow] if SLOW.search(example[0]) else [])
    for name, page in PAGES.items()
    for example in EXAMPLE.findall(page)
]
IMPORTED_AS = {"scikit_learn": "sklearn"}  # packages of another name than their modules
OPTIONAL = {"natten"}  # what even our tests do not bring: it is compiled for a GPU
WARNED_OF = OPTIONAL | {"monai", "spandrel"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MMSEG = "isanet_r50-d8_512x1024_40k_cityscapes_20210901_054739-981bd763.pth"
STANDS_FOR = {"SHAPE": "--partition local --tokens 49", "NAME": "eager"}  # what a reader puts in the place of a word


def commands(page: str) -> list[list[str]]:
    """The words behind ``python -m bench`` of every command line, in blocks and in `code`, variables filled in."""
    lines = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", page)]
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL):
        for name, value in re.findall(r'^(\w+)="(.*)"$', block, re.MULTILINE):
            block = block.replace(f"${name}", value)
        lines += block.splitlines()
    called = [line.partition("-m bench ")[2] for line in lines if "-m bench " in line]
    filled = [re.sub(r"\b[A-Z]+\b", lambda word: STANDS_FOR.get(word[0], word[0]), line) for line in called]
    return [shlex.split(line, comments=True) for line in filled]


COMMANDS = [(name, words) for name, page in PAGES.items() for words in commands(page) if words[0] != "COMMAND"]


def test_the_front_page_is_read_in_one_sitting() -> None:
    assert len(README.splitlines()) <= 160


def imported(example: str) -> set[str]:
    """The packages that an example imports, beside Python's and those that the library brings."""
    nodes = list(ast.walk(ast.parse(example)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"isa_triton", "numpy", "torch"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files like those that examples load, of the same names."""
    folder = tmp_path_factory.mktemp("published")
    downloads = folder / "hub" / "checkpoints"
    downloads.mkdir(parents=True)
    weights = as_published(head_weights("conv", "bn", "conv_seg", (2048, 512, 256, 19)), "mmseg")
    torch.save({"state_dict": weights}, downloads / MMSEG)
    authors = {"0.weight": kernel(512, 2048, 3)} | batch_norm("1", 512, abn=True)
    authors |= {f"2.{name}": x for name, x in openseg_weights((512, 256, 512, 512), 1, abn=True).items()}
    classifier = {"cls_head.weight": kernel(19, 512), "cls_head.bias": torch.randn(19)}
    torch.save(
        {"state_dict": {f"isa_head.{name}": x for name, x in authors.items()} | classifier}, folder / "isanet.pth"
    )
    return folder


@pytest.fixture
def published(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links to them, where examples load them from."""
    shutil.copytree(files, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(("page", "example", "printed"), EXAMPLES)
def test_the_examples_run_and_print_what_the_page_says(page: str, example: str, printed: str) -> None:
    optional = OPTIONAL & imported(example)
    for package in optional:
        if not find_spec(package):
            pytest.skip(f"{package} is not installed")
    their_own = "ignore" if WARNED_OF & imported(example) else None  # what other packages are warned of
    with contextlib.redirect_stdout(io.StringIO()) as said, warnings.catch_warnings(action=their_own):
        exec(compile(example, page, "exec"), {})
    if printed:
        assert said.getvalue() == printed


@pytest.mark.parametrize(("page", "example", "printed"), EXAMPLES)
def test_an_example_says_what_to_install(page: str, example: str, printed: str) -> None:
    hints = " ".join(re.findall(r"^# pip install (.*)$", example, re.MULTILINE))
    brought = [need for extra in re.findall(r"'\.\[(\w+)\]'", hints) for need in EXTRAS[extra]]
    packages = {re.split("[<>=]", need)[0].replace("-", "_") for need in (*brought, *hints.split())}
    packages = {IMPORTED_AS.get(package, package) for package in packages}
    assert imported(example) - packages == set()


def test_every_page_has_an_example_or_a_command() -> None:
    assert {name for name, _ in COMMANDS} | {example.values[0] for example in EXAMPLES} == set(PAGES)


@pytest.mark.slow
def test_the_sharded_script_runs_as_printed(tmp_path: Path) -> None:
    page = PAGES["isa_triton/sharding/README.md"]
    (script,) = re.findall(r"<!-- sharded -->\n```python\n(.*?)```", page, re.DOTALL)
    (command,) = re.findall(r"<!-- sharded run -->\n```sh\n(.*?)\n```", page, re.DOTALL)
    assert command == "torchrun --nproc-per-node 2 map.py"
    (tmp_path / "map.py").write_text(script)
    arguments = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "map.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PET_STANDALONE": "1"}  # any port
    run = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )  # its status is not asked: gloo sometimes aborts a process that has ended in good order
    assert "(1, 32, 64, 96) -> (1, 19, 256, 384) of which here (1, 19, 128, 384)" in run.stdout, run.stderr


def anchors(page: str) -> set[str]:
    """The names under which GitHub finds the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings_that_exist(name: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]) if not link.startswith("http")]
    here = ROOT / name
    missing = []
    for link in links:
        path, _, heading = link.partition("#")
        target = here.parent / path if path else here
        if not target.exists() or (heading and heading not in anchors(target.read_text())):
            missing.append(link)
    assert missing == []


@pytest.mark.parametrize("name", PAGES)
def test_files_named_in_the_text_exist(name: str) -> None:
    folders = r"(?:isa_triton|bench|reference|tests)/[\w/]+\.\w+"
    assert [path for path in re.findall(rf"`({folders})`", PAGES[name]) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[f"{page}: {' '.join(words)}" for page, words in COMMANDS])
def test_the_bench_accepts_the_command(
    page: str, words: list[str], monkeypatch: pytest.MonkeyPatch, compiling: None
) -> None:
    module = f"bench.tiles.{words[1]}" if words[0] == "tiles" else f"bench.{words[0]}"
    chosen: list[argparse.Namespace] = []
    monkeypatch.setattr(import_module(module), "run", chosen.append)
    bench.main(words)
    assert len(chosen) == 1


def test_every_command_of_the_bench_is_on_a_page() -> None:
    named = {words[0] for _, words in COMMANDS}
    assert set(bench.COMMANDS) - named == set()


def test_ci_finds_the_test_command() -> None:
    (command,) = re.findall(r"<!-- tests -->\n```sh\n(.*?)\n```", README, re.DOTALL)
    assert command == "pip install -e '.[test]' && pytest"
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()
