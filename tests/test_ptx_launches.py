"""Launches on CPU tensors, compiled for a target and executed: ``pytest --device ptx:sm_90`` with this file.

The fixture `machine` is the emulator. Without `--device ptx:TARGET` kernels of this process are interpreted, and these
tests are skipped; the last one runs them, and the kernels' own, in a process of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import triton
import triton.language as tl

from isa_triton import Partition, partitioned_attention
from tests.compiling import run_compiling

if TYPE_CHECKING:
    from bench.ptx_machine.driver import Device


@triton.jit
def scale_kernel(x, y, n, factor, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, factor * tl.load(x + i, i < n), i < n)


@triton.jit
def overrun_kernel(x, y, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i))


def test_a_kernel_is_launched_on_cpu_tensors(machine: Device) -> None:
    x, y = torch.randn(1000), torch.full((1000,), float("nan"))
    scale_kernel[(4,)](x, y, 1000, 3.0, BLOCK=256)
    assert torch.equal(y, 3 * x)
    (done,) = machine.executions
    assert (done.kernel, done.programs) == ("scale_kernel", 4)
    assert (done.loaded, done.stored) == ({x.data_ptr(): 4000}, {y.data_ptr(): 4000})


def test_what_a_gpu_would_not_notice_is_raised(machine: Device) -> None:
    from bench.ptx_machine.faults import Fault

    with pytest.raises(Fault, match="overrun_kernel: global memory: outside every tensor"):
        overrun_kernel[(1,)](torch.zeros(100), torch.zeros(128), BLOCK=128)


def test_the_library_is_called_as_ever(machine: Device) -> None:
    partition = Partition.local((6, 10), (3, 5))
    q, k, v = (torch.randn(2, 6, 10, 2, 16, dtype=torch.float16, requires_grad=True) for _ in range(3))
    results = {}
    for backend in ("triton", "eager"):
        out = partitioned_attention(q, k, v, partition, backend=backend)
        results[backend] = (out, *torch.autograd.grad(out.float().square().sum(), (q, k, v)))
    for found, wanted in zip(*results.values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0.01, atol=0.01 * wanted.abs().max().item())
    assert {done.kernel for done in machine.executions} == {"forward_group_kernel", "backward_group_kernel"}


SELECTED = (  # of the kernels' own tests: a ragged shifted map with a bias, many blocks, strides, dtypes
    "tests/test_kernels.py::test_a_named_case_keeps_the_budget[shifted windows]",
    "tests/test_kernels.py::test_a_named_case_keeps_the_budget[bf16]",
    "tests/test_kernels.py::test_a_named_case_keeps_the_budget[slices of larger tensors]",
)


@pytest.mark.slow
def test_tests_of_kernels_run_on_the_machine() -> None:
    quiet = "-n0", "-p", "no:cacheprovider", "-rs"
    done = run_compiling("-m", "pytest", "--device", "ptx:sm_90", "-m", "not slow", __file__, *SELECTED, *quiet)
    assert done.returncode == 0, done.stdout
    assert "7 passed, 1 deselected" in done.stdout


def test_a_target_that_the_machine_does_not_have_is_an_error_in_words() -> None:
    done = run_compiling("-m", "pytest", "--device", "ptx:sm_75", __file__, "-n0", "-p", "no:cacheprovider")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device must be one of ptx:sm_80, " in done.stderr
