"""The house keeps its order: who imports whom, and what happens where triton is missing."""

from __future__ import annotations

import ast
import doctest
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# A file may import what stands right of it, and nothing else of ours; external packages are checked where it matters.
ARROWS = {
    "isa_triton.partition": set(),
    "isa_triton.eager": {"isa_triton.partition"},
    "isa_triton.tiles": set(),
    "isa_triton.kernels": {"isa_triton.partition", "isa_triton.tiles", "isa_triton.kernels"},
    "isa_triton.fused": {"isa_triton.partition", "isa_triton.eager", "isa_triton.kernels", "isa_triton.tiles"},
    "isa_triton.ops": {"isa_triton.partition", "isa_triton.eager", "isa_triton.fused"},
    "isa_triton.functional": {"isa_triton.partition", "isa_triton.fused", "isa_triton.ops"},
    "isa_triton.modules": {"isa_triton.partition", "isa_triton.functional"},
    "isa_triton.checkpoints": {"isa_triton.partition", "isa_triton.eager", "isa_triton.modules"},
    "isa_triton.models": {
        "isa_triton.partition",
        "isa_triton.functional",
        "isa_triton.modules",
        "isa_triton.checkpoints",
        "isa_triton.models",
    },
    "isa_triton.exchange": set(),
    "isa_triton.sharding": {"isa_triton.exchange", "isa_triton.modules"},
    "isa_triton": {"isa_triton.partition", "isa_triton.functional", "isa_triton.modules"},
    "reference": {"reference"},
    "bench": {"bench", "isa_triton", "reference"},
    "tests": {"tests", "bench", "isa_triton", "reference"},
}
WITHOUT_TORCH = ("isa_triton.partition", "isa_triton.kernels", "isa_triton.tiles")
TORCH_ONLY = ("reference",)


def modules() -> dict[str, Path]:
    files = (path for folder in ("isa_triton", "reference", "bench", "tests") for path in (ROOT / folder).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(name: str, path: Path) -> set[str]:
    """Absolute names of everything that a file imports, at any depth."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names} if origin in modules() else {origin}
    return found


def within(name: str, parents: set[str]) -> bool:
    """Whether a name is one of the parents or lies inside one; the package isa_triton stands for its public names."""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)


@pytest.mark.parametrize("name", sorted(modules()))
def test_arrows(name: str) -> None:
    rule = next((key for key in sorted(ARROWS, key=len, reverse=True) if within(name, {key})), None)
    assert rule is not None, f"{name} has no place in the house"
    if rule == "isa_triton" and name != "isa_triton":
        pytest.fail(f"{name} has no arrows: say in ARROWS what it may import")
    ours = {
        other
        for other in imports(name, modules()[name])
        if other.split(".")[0] in ("isa_triton", "reference", "bench", "tests")
    }
    assert {other for other in ours if not within(other, ARROWS[rule])} == set()
    external = {other.split(".")[0] for other in imports(name, modules()[name])} - sys.stdlib_module_names
    if within(name, set(WITHOUT_TORCH)):
        assert "torch" not in external
    if within(name, set(TORCH_ONLY)):
        assert external <= {"torch", "reference", "__future__"}


def python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_library_works_without_triton() -> None:
    output = python(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, isa_triton\n"
        "print(*isa_triton.InterlacedSparseSelfAttention(4, 3, 5)(torch.randn(1, 4, 9, 11)).shape)\n"
    )
    assert output.split() == ["1", "4", "9", "11"]


def test_broken_kernels_are_not_taken_for_missing_triton() -> None:
    output = python(
        "import sys; sys.modules['isa_triton.kernels.backward'] = None\n"
        "try: import isa_triton\n"
        "except ModuleNotFoundError as error: print(error.name)\n"
    )
    assert output.split() == ["isa_triton.kernels.backward"]


@pytest.mark.parametrize("name", ["partition", "tiles", "functional", "modules", "checkpoints", "exchange"])
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(f"isa_triton.{name}")
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0
