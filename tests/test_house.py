"""The house keeps its order: who imports whom, and what happens where triton is missing."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys

import pytest
import torch

from tests.house import (
    ARROWS,
    PACKAGES,
    ROOT,
    TORCH_ONLY,
    WITHOUT_TORCH,
    imports,
    is_within,
    modules,
    picture,
)


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_file_imports_from_lower_floors_only(name: str) -> None:
    rule = next((key for key in sorted(ARROWS, key=len, reverse=True) if is_within(name, {key})), None)
    assert rule is not None, f"{name} has no place in the house"
    if rule == "isa_triton" and name != "isa_triton":
        pytest.fail(f"{name} has no arrows: say in ARROWS what it may import")
    found = set(imports(name))
    ours = {other for other in found if other.split(".")[0] in PACKAGES}
    assert {other for other in ours if not is_within(other, ARROWS[rule])} == set()
    external = {other.split(".")[0] for other in found} - sys.stdlib_module_names
    if is_within(name, WITHOUT_TORCH):
        assert "torch" not in external
    if is_within(name, TORCH_ONLY):
        assert external <= {"torch", "reference", "__future__"}


def test_no_arrow_leads_back() -> None:
    arrows = picture()
    while True:  # take rooms away that nothing enters, until none is left
        entered = {to for _, to in arrows}
        lower = {(start, to) for start, to in arrows if start in entered}
        if lower == arrows:
            break
        arrows = lower
    assert arrows == set()


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
        "import os, sys; os.environ['TRITON_INTERPRET'] = '1'\n"
        "sys.modules['isa_triton.backend.kernels.backward'] = None\n"
        "import torch; from isa_triton import *; q = torch.ones(1, 4, 6, 1, 16)\n"
        "try: partitioned_attention(q, q, q, Partition.dense((4, 6)), backend='triton')\n"
        "except ModuleNotFoundError as error: print(error.name)\n"
    )
    assert output.split() == ["isa_triton.backend.kernels.backward"]


@pytest.mark.parametrize(
    "name", ["partition", "tiles", "functional", "maps", "modules", "inference", "sharding.layouts"]
)
def test_examples_in_docstrings(name: str) -> None:
    module = importlib.import_module(f"isa_triton.{name}")
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0


def test_importing_the_library_loads_nothing_that_only_kernels_compilers_and_figures_need() -> None:
    output = python("import sys, isa_triton, isa_triton.models.block, isa_triton.checkpoints; print(*sys.modules)")
    heavy = {"triton", "matplotlib", "rich", "timm", "torchvision", "torch._dynamo", "torch._inductor", "sympy"}
    assert heavy & set(output.split()) == set()
