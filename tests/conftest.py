"""One process interprets Triton kernels or compiles them, never both: here they are interpreted.

`pytest --device cuda` compiles them instead: tests of what the kernels compute (fixture `kernels`) then run on a GPU,
those that look into the interpreter (fixture of its name) are skipped, and all others run on the CPU as ever. With
`--device ptx:sm_90` no GPU is needed: tensors stay on the CPU, and an emulator executes what was compiled for the
target (fixture `machine`, which says what it did).
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, read when it is imported: one core each, as torch below

import argparse
import secrets
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from bench.ptx_machine.driver import Device


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "where tests of the kernels run: cpu interprets them, a GPU compiles them, ptx:TARGET emulates one"
    parser.addoption("--device", default="cpu", metavar="DEVICE", help=what)


def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-xdist starts workers, which inherit the environment, and before anything of ours is imported.

    TRITON_INTERPRET is read when a kernel is decorated.
    """
    choose_device(config.getoption("--device"))
    choose_seed()


def choose_device(name: str) -> None:
    """Where tests of the kernels run, for `tests.guard`; on a GPU nothing is interpreted.

    Raises:
        pytest.UsageError: there is no such device, or kernels are to be interpreted.
    """
    os.environ["ISA_TRITON_DEVICE"] = name
    if name == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
        return
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise pytest.UsageError(f"--device {name} compiles kernels, but TRITON_INTERPRET=1 interprets them: unset it")
    if name.startswith("ptx:"):
        from bench.ptx_machine.command import device

        try:
            device(name)
        except argparse.ArgumentTypeError as error:
            raise pytest.UsageError(f"--device {error}") from error
        return
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise pytest.UsageError(f"--device must be a device of this machine, got {name!r}: {reason}") from error


def choose_seed() -> None:
    """Draw a sweep's seed: workers inherit it, and so draw the same cases."""
    sweep = os.environ.get("ISA_TRITON_SWEEP", "0")
    seed = os.environ.setdefault("ISA_TRITON_SEED", str(secrets.randbits(32) if sweep != "0" else 0))
    for name, number in {"ISA_TRITON_SWEEP": sweep, "ISA_TRITON_SEED": seed}.items():
        if not number.isdecimal():
            raise pytest.UsageError(f"{name} must be a whole number, got {number!r}")


def pytest_report_header() -> list[str]:
    """How to repeat a sweep."""
    names = "ISA_TRITON_SWEEP", "ISA_TRITON_SEED"
    return [" ".join(f"{name}={os.environ[name]}" for name in names)] if names[0] in os.environ else []


@pytest.fixture(scope="session")
def interpreter() -> None:
    """Triton's interpreter, its bf16 right and its launches checked by `guard.watch`."""
    from tests import guard  # loads triton, which most tests do without

    if guard.COMPILED:
        pytest.skip(f"looks into Triton's interpreter, and --device {guard.NAME} compiles the kernels")
    guard.install()


@pytest.fixture
def machine() -> Iterator[Device]:
    """The emulator that launches on CPU tensors go to; its `executions` say what each did."""
    from bench.ptx_machine.driver import installed
    from tests import guard

    if guard.MACHINE is None:
        pytest.skip("executes compiled kernels on the PTX machine: pytest --device ptx:sm_90")
    with installed(guard.MACHINE) as device:
        yield device


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """The kernels: interpreted, or with `--device` on a GPU, where tensors are made unless a test says otherwise.

    With ptx:TARGET they are compiled and executed by `machine`.
    """
    from tests import guard

    if not guard.COMPILED:
        request.getfixturevalue("interpreter")
        yield
        return
    if guard.MACHINE:
        request.getfixturevalue("machine")
    with torch.device(guard.DEVICE):
        yield


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of who compiles kernels; those of this process are decorated first, and stay interpreted."""
    import_module("isa_triton.backend.kernels.launch")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A seed, one thread, and no compiled frames: Dynamo counts those of all tests of a worker to one limit."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # pytest-xdist has taken the other cores
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
