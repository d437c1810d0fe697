"""One process interprets Triton kernels or compiles them, never both: here they are interpreted."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before any import of the library

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_seed_one_thread() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # pytest-xdist has taken the other cores
