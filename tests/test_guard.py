"""The guard of the interpreter sees what it is for, and computes bf16 as torch does."""

from __future__ import annotations

import pytest
import torch

from isa_triton.backend.kernels import launch
from isa_triton.partition import Partition
from isa_triton.tiles import Tile
from tests import conftest, guard
from tests.compiling import run_compiling

pytestmark = pytest.mark.usefixtures("interpreter")


def test_bf16_rounds_to_nearest_even_as_torch_does() -> None:
    values = torch.randn(4096) * 1e3
    values[:3] = torch.tensor([float("inf"), float("nan"), 1.00390625])
    ours = torch.from_numpy(guard.bf16_to_fp32(guard.fp32_to_bf16(values.numpy())))
    torch.testing.assert_close(ours, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_the_guard_sees_each_bug_it_is_for() -> None:
    partition, tile, q = Partition.local((8, 4), window=(4, 4)), Tile(16, 16, 64, 32), torch.zeros(1, 8, 4, 1, 32)
    beyond = Partition.local((9, 4), (3, 4))  # a map one row higher than the tensor
    with guard.watch(), pytest.raises(Exception, match="elements of no tensor"):
        launch.forward(q, q, q, None, q.clone(), None, 1.0, beyond, tile)
    with guard.watch(), pytest.raises(Exception, match="at once"):
        launch.forward(q, q, q, None, q[:, :, :, :, :1].clone().expand_as(q), None, 1.0, partition, tile)
    with guard.watch(), pytest.raises(Exception, match="another wrote"):
        launch.forward(q, q, q, None, q, None, 1.0, partition, Tile(16, 16, 32, 32)._replace(block_m=8))
    with guard.watch() as memory:
        launch.forward(q, q, q, None, torch.empty_like(q), None, 1.0, partition, tile)
    assert memory.unwritten(q) == q.numel()


def test_shuffled_programs_run_once_each_in_another_order() -> None:
    partition, tile = Partition.local((4, 2), window=(2, 2)), Tile(16, 16, 64, 32)
    q = torch.randn(2, 4, 2, 1, 32)
    outcomes = set()
    for seed in range(4):
        out, shared = torch.empty_like(q), torch.empty_like(q[:1])
        with guard.watch() as memory, guard.shuffled(seed):
            launch.forward(q, q, q, None, out, None, 1.0, partition, tile)
        assert memory.unwritten(out) == 0
        with guard.shuffled(seed):  # both maps' outputs in one place: the later program's stays
            launch.forward(q, q, q, None, shared.expand_as(q), None, 1.0, partition, tile)
        outcomes |= {torch.equal(out[1, rows], shared[0, rows]) for rows in (slice(2), slice(2, 4))}
    assert outcomes == {True, False}


# -- pytest --device ---------------------------------------------------------------------------------------------------

PRETEND = """
import sys
import pytest, torch
empty = torch.empty
torch.empty = lambda *sizes, device=None, **options: empty(*sizes, **options)  # any device is here
sys.exit(pytest.main([*sys.argv[1:], "-n0", "-p", "no:cacheprovider"]))
"""
NOTHING_WRITTEN = """
import torch
from bench import stand_in
from tests import guard
from tests.kernel_cases import assert_within_budget, of_groups, tiles_of

assert guard.COMPILED
with guard.watch() as memory:
    assert (memory.unwritten(torch.zeros(3)), memory.unwritten(torch.full((3,), float("nan")))) == (0, 3)
for form in ("one block", "many blocks"):
    case = of_groups("local", (3, 6), (2, 1))
    with stand_in.installed() as launches:
        try:
            assert_within_budget(case, tiles_of(form, 18))
        except AssertionError as error:
            print(str(error).splitlines()[0], *launches.names(), sep=", ")
"""


def test_on_a_device_what_looks_into_the_interpreter_is_skipped_and_says_why() -> None:
    looking = [test_bf16_rounds_to_nearest_even_as_torch_does, test_shuffled_programs_run_once_each_in_another_order]
    names = [f"tests/test_guard.py::{test.__name__}" for test in looking]
    done = run_compiling("-c", PRETEND, "--device", "cuda", "-rs", *names)
    assert done.returncode == 0, done.stdout
    assert "2 skipped" in done.stdout
    assert "looks into Triton's interpreter, and --device cuda compiles the kernels" in done.stdout


def test_a_device_that_is_not_here_is_an_error_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_compiling("-m", "pytest", "--device", "abacus", "tests/test_guard.py", "-n0", "-p", "no:cacheprovider")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device must be a device of this machine, got 'abacus': Expected one of cpu" in done.stderr
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("ISA_TRITON_DEVICE", "cpu")
    with pytest.raises(pytest.UsageError, match="--device cuda compiles kernels, but TRITON_INTERPRET=1 interprets"):
        conftest.choose_device("cuda")


@pytest.mark.slow
def test_on_a_device_kernels_are_launched_and_results_that_nothing_wrote_fail() -> None:
    done = run_compiling("-c", NOTHING_WRITTEN)
    assert done.returncode == 0, done.stderr
    short, long = "forward_group_kernel, backward_group_kernel", "forward_kernel, backward_queries_kernel"
    assert done.stdout.splitlines() == [f"out, {short}", f"out, {long}, backward_keys_kernel"]
