"""What models and training loops do to a layer: copies, threads, workers, checkpointing, compilers, other modes."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from isa_triton import InterlacedSparseSelfAttention, ISAHead, ISAModule, Partition, partitioned_attention
from tests.cases import qkv, relative_error

ROOT = Path(__file__).parent.parent


def layer() -> InterlacedSparseSelfAttention:
    return InterlacedSparseSelfAttention(4, 3, 5, partition_size=(3, 2)).eval()


@pytest.mark.parametrize("module", [layer(), ISAModule(4, 3, 5, 6), ISAHead(4, 5, 2, key_channels=3)])
def test_copies_and_pickles_are_the_same_function(module: nn.Module) -> None:
    x = torch.randn(1, 4, 8, 9)
    expected = module.eval()(x)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    again = copy.deepcopy(module)
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    again.load_state_dict(torch.load(file, weights_only=True))
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), again):
        assert torch.equal(copied(x), expected)
    partition = Partition.local((4, 6), window=(2, 3))
    assert pickle.loads(pickle.dumps(partition)) == partition


def test_threads_do_not_disturb_each_other() -> None:
    attend, maps = layer(), torch.randn(16, 1, 4, 7, 9).unbind()
    expected = [attend(x) for x in maps]
    with ThreadPoolExecutor(4) as pool:
        for a, e in zip(pool.map(attend, maps), expected, strict=True):
            assert torch.equal(a, e)


class Attended(Dataset[Tensor]):
    """Items that a worker computes by attention."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        q = k = v = torch.full((1, 4, 6, 1, 2), float(index))
        return partitioned_attention(q, k, v, Partition.local((4, 6), window=(2, 3)))[0]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # fork, told by the test
def test_workers_of_a_data_loader_attend(context: str) -> None:
    loader = DataLoader(Attended(), num_workers=1, multiprocessing_context=context)
    assert [float(item.mean()) for item in loader] == [0.0, 1.0]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(backend: str, reentrant: bool) -> None:
    partition = Partition.interlaced((5, 7), stride=(2, 3))
    leaves = [x.requires_grad_() for x in qkv(partition, dtype=torch.float32)]

    def loss(*leaves: Tensor) -> Tensor:
        return partitioned_attention(*leaves, partition, backend=backend).sin().sum()

    expected = torch.autograd.grad(loss(*leaves), leaves)
    checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
    for leaf, e in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, e)


def shifted_windows(x: Tensor) -> Tensor:
    q = x.permute(0, 2, 3, 1)[:, :, :, None]
    return partitioned_attention(q, q, q, Partition.local((x.shape[2], x.shape[3]), (4, 3), shift=(1, 2)))


@pytest.mark.parametrize("attend", [layer(), shifted_windows])
def test_ten_resolutions_are_compiled_at_most_twice(attend: Callable[[Tensor], Tensor]) -> None:
    counter = CompileCounter()
    compiled = torch.compile(attend, backend=counter, dynamic=True, fullgraph=True)
    for side in range(8, 18):
        x = torch.randn(1, 4, 3 * side, 2 * side + 2)
        assert relative_error(compiled(x), attend(x)) < 1e-6
    assert counter.frame_count <= 2


def test_deterministic_mode_and_inference_mode_change_nothing() -> None:
    attend, x = layer(), torch.randn(1, 4, 7, 9)
    expected = attend(x)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(attend(x), expected)
    finally:
        torch.use_deterministic_algorithms(False)
    with torch.inference_mode():
        assert torch.equal(attend(x), expected)


def test_an_exported_layer_runs_on_other_inputs() -> None:
    attend, x = layer(), torch.randn(1, 4, 7, 9)
    program = torch.export.export(attend, (x,))
    other = torch.randn_like(x)
    assert relative_error(program.module()(other), attend(other)) < 1e-6


@pytest.mark.slow
def test_optimised_python_refuses_and_computes_alike() -> None:
    """Nothing depends on assert statements."""
    script = (
        "import torch; from isa_triton import *; q = torch.ones(1, 4, 6, 1, 2)\n"
        "assert False, 'not optimised'\n"
        "p = Partition.local((4, 6), window=(2, 3))\n"
        "print(float(partitioned_attention(q, q, q, p).mean()))\n"
        "try: partitioned_attention(q, q[:, 1:], q, p)\n"
        "except ValueError as error: print(error)\n"
    )
    said = "k must have the shape of q, (1, 4, 6, 1, 2), or heads that divide its heads, got (1, 3, 6, 1, 2)"
    run = subprocess.run([sys.executable, "-O", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["1.0", said]
