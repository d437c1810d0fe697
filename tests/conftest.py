"""One process interprets Triton kernels or compiles them, never both: here they are interpreted."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before any import of the library
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's, read when it is imported: one core each, as torch below

import secrets
import sys
from collections.abc import Iterator

import pytest
import torch


def pytest_configure() -> None:
    """Draw a sweep's seed before pytest-xdist starts workers: they inherit it, and so draw the same cases."""
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
def mended_interpreter() -> None:
    """Triton's interpreter, its bf16 right and its launches checked by `guard.watch`."""
    from tests import guard  # loads triton, which most tests do without

    guard.install()


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A seed, one thread, and no compiled frames: Dynamo counts those of all tests of a worker to one limit."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # pytest-xdist has taken the other cores
    yield
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()
