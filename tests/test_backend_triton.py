"""The Triton backend as PyTorch sees it, its kernels interpreted: derivatives, operators, compilers, what is kept."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from bench.tiles import options, search
from isa_triton import InterlacedSparseSelfAttention, Partition, partitioned_attention, tiles
from isa_triton import partitioned_attention_with_lse as with_lse
from isa_triton.backend import triton as triton_backend
from isa_triton.backend.contract import Call
from isa_triton.backend.kernels import launch, plan
from isa_triton.backend.triton import in_whole_rows
from tests.cases import PARTITIONS, qkv, relative_error

pytestmark = pytest.mark.usefixtures("kernels")
ONE_KERNEL = PARTITIONS["interlaced-ragged"]
TINY = Partition.interlaced((3, 3), stride=(2, 2))
TWO_PASSES = Partition.dense((13, 5))  # 65 tokens: one more than the interpreter's tiles take whole


def inputs(partition: Partition, bias: bool = True, width: int = 16) -> list[Tensor]:
    heads = 2 if partition is ONE_KERNEL else 1
    tensors = list(qkv(partition, 1, heads, key_width=width, value_width=width, dtype=torch.float32))
    if bias:
        tensors.append(torch.randn(heads, partition.tokens, partition.tokens))
    return [x.requires_grad_() for x in tensors]


def call(tensors: list[Tensor], partition: Partition, backend: str) -> tuple[Tensor, Tensor]:
    q, k, v, *bias = tensors
    return with_lse(q, k, v, partition, bias=bias[0] if bias else None, backend=backend)


@pytest.mark.parametrize("partition", [ONE_KERNEL, TWO_PASSES], ids=["one kernel", "two passes"])
@pytest.mark.parametrize("bias", [False, True])
def test_backends_agree_in_outputs_and_gradients(partition: Partition, bias: bool) -> None:
    tensors = inputs(partition, bias)
    upstream = (torch.randn_like(tensors[2]), torch.randn(tensors[0].shape[:-1]))
    results = []
    for backend in ("triton", "eager"):
        outputs = call(tensors, partition, backend)
        results.append((*outputs, *torch.autograd.grad(outputs, tensors, upstream)))
    for a, e in zip(*results, strict=True):
        assert relative_error(a, e) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 65, 65), (3, 2, 5, 5), (0, 2, 7, 7), (2, 64, 64)], ids=str)
def test_a_bias_that_is_read_again_has_rows_of_whole_16_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tokens, bias = shape[-1], torch.randn(shape).to(dtype)
    together = 16 // bias.itemsize
    whole = in_whole_rows(bias, kept=False)
    assert whole is not None
    assert all(stride % together == 0 for stride in whole.stride()[:-1])
    assert torch.equal(whole[..., :tokens, :tokens], bias)
    assert whole.count_nonzero() == bias.count_nonzero()
    assert in_whole_rows(bias, kept=True) is bias
    assert (whole is bias) == (tokens == 64)
    of_all_heads = in_whole_rows(bias[..., :1, :, :].expand(shape), kept=False)
    assert of_all_heads is not None
    assert of_all_heads.stride(-3) == 0


@pytest.mark.parametrize("tokens", [65, 71, 72])
def test_kernels_are_told_how_the_rows_of_a_bias_are_aligned(tokens: int) -> None:
    partition = Partition.dense((1, tokens))
    tensors = inputs(partition)
    biases = []
    for pass_ in ("forward", "backward"):
        with patch.object(launch, pass_, wraps=getattr(launch, pass_)) as spy:
            call(tensors, partition, "triton")[0].sum().backward()
        biases.append(spy.call_args.args[3])
    for bias in biases:
        laid_out = plan._pairs(plan.Pointer("bias", "fp32", True, True), plan.Layout(*launch.layout(bias)))
        assert laid_out.unit.value == 4
        assert laid_out.tokens * 4 == -(-tokens // 4) * 4


def test_calls_made_again_give_such_a_bias_too() -> None:
    """Where they are replayed a wrong one shows on a GPU alone: launches are given addresses."""
    q, k, v, bias = (x.detach() for x in inputs(TWO_PASSES))
    settled = Call(1.0, TWO_PASSES, with_lse=True, backend="triton")
    with patch.object(launch, "Replay") as replay:
        forward = triton_backend.Replay(settled, q, k, v, bias)
        out, lse = forward(q, k, v, bias)
        triton_backend.BackwardReplay(settled, q, k, v, bias, out, lse, v)(q, k, v, bias, out, lse, v)
    given = [args[1] if len(args) > 1 else args[0] for _, args, _ in replay.mock_calls if args]
    assert [tuple(tensors[3].shape) for tensors in given] == [(1, 68, 68)] * 4


@pytest.mark.parametrize("partition", [ONE_KERNEL, TWO_PASSES], ids=["one kernel", "two passes"])
def test_gradients_need_no_lse_that_was_asked_for(partition: Partition) -> None:
    (q, k, v, bias), results = inputs(partition), []
    upstream = torch.randn_like(v)
    for backend in ("triton", "eager"):
        out = partitioned_attention(q, k, v, partition, bias=bias, backend=backend)
        results.append((out, *torch.autograd.grad(out, (q, k, v, bias), upstream)))
    for a, e in zip(*results, strict=True):
        assert relative_error(a, e) < 1e-5


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("partition", [ONE_KERNEL, TWO_PASSES], ids=["one kernel", "two passes"])
@pytest.mark.parametrize("bias", [False, True])
def test_no_more_is_kept_than_backward_needs(partition: Partition, bias: bool) -> None:
    """The inputs, and out and lse only where groups do not fit in one block."""
    tensors = inputs(partition, bias)
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call(tensors, partition, "triton")[0]
    extra = [x.shape for x in kept if not any(x.data_ptr() == y.data_ptr() for y in tensors)]
    two_passes = triton_backend.keeps_output(tensors[0], tensors[2], partition)
    assert two_passes == (partition is TWO_PASSES)
    assert extra == ([out.shape, out.shape[:-1]] if two_passes else [])


@pytest.mark.parametrize("partition", [ONE_KERNEL, TWO_PASSES], ids=["one kernel", "two passes"])
def test_backward_is_deterministic_to_the_bit(partition: Partition) -> None:
    tensors = inputs(partition)
    upstream = torch.randn_like(tensors[2])
    first, second = (torch.autograd.grad(call(tensors, partition, "triton")[0], tensors, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own look at copies
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_operators_pass_opcheck(bias: bool, transposed: bool) -> None:
    q, k, v, *rest = inputs(TINY, bias)
    if transposed:
        q, k, v = (x.detach().transpose(1, 4).contiguous().transpose(1, 4).requires_grad_() for x in (q, k, v))
    b, axes = (rest[0] if rest else None), Call(0.5, TINY, False, "triton").flat()[1]
    torch.library.opcheck(torch.ops.isa_triton.forward.default, (q, k, v, b, *[None] * 4, 0.5, axes, True, "triton"))
    plain = [None if x is None else x.detach() for x in (q, k, v, b)]
    arguments = (*plain, *[None] * 6, torch.randn_like(v), None, 0.5, axes, False, "triton")
    torch.library.opcheck(torch.ops.isa_triton.backward.default, arguments)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.slow
def test_the_layer_compiles_through_the_operators() -> None:
    """The whole layer in training mode, in one graph, with the kernels as its attention."""
    layer = InterlacedSparseSelfAttention(4, 16, 16, partition_size=(3, 2))
    x = torch.randn(1, 4, 5, 7)
    expected = layer(x)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    layer.long_range.backend = layer.short_range.backend = "triton"
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph.code)
        return graph.forward

    actual = torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert relative_error(actual, expected) < 1e-4
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    for p, gradient in zip(layer.parameters(), gradients, strict=True):
        assert p.grad is not None
        assert relative_error(p.grad, gradient) < 1e-3


def test_second_derivatives_and_transforms_work_through_the_plain_formula() -> None:
    partition = Partition.local((3, 2), window=(2, 2))
    tensors = inputs(partition, bias=False, width=3)

    def loss(backend: str, q: Tensor) -> Tensor:
        return call([q, *tensors[1:]], partition, backend)[0].sin().sum()

    q = tensors[0].detach()
    for transform in (torch.func.grad, torch.func.hessian, torch.func.jacfwd):
        triton, eager = (transform(lambda q, backend=b: loss(backend, q))(q) for b in ("triton", "eager"))
        assert relative_error(triton, eager) < 1e-4
    batched = torch.func.vmap(lambda q: loss("triton", q))(torch.stack([q, 2 * q]))
    assert relative_error(batched, torch.stack([loss("eager", q), loss("eager", 2 * q)])) < 1e-5


@pytest.mark.usefixtures("interpreter")
def test_exported_graphs_hold_the_operator() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return partitioned_attention(q, k, v, ONE_KERNEL, backend="triton")

    tensors = tuple(x.detach() for x in inputs(ONE_KERNEL, bias=False))
    exported = torch.export.export(Layer(), tensors)
    assert any(node.target is torch.ops.isa_triton.forward.default for node in exported.graph.nodes)
    assert torch.equal(exported.module()(*tensors), Layer()(*tensors))


@pytest.mark.usefixtures("interpreter")
def test_what_the_kernels_cannot_take_is_said() -> None:
    q, k, v = qkv(ONE_KERNEL)
    with pytest.raises(ValueError, match=r"backend='triton' cannot be had: the kernels take .* not torch.float64"):
        partitioned_attention(q, k, v, ONE_KERNEL, backend="triton")


@pytest.mark.usefixtures("interpreter")
def test_without_the_interpreter_a_cpu_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    q, k, v = qkv(ONE_KERNEL, dtype=torch.float32)
    with pytest.raises(ValueError, match="run on cuda and xpu devices, or interpreted"):
        partitioned_attention(q, k, v, ONE_KERNEL, backend="triton")
    assert torch.equal(
        partitioned_attention(q, k, v, ONE_KERNEL), partitioned_attention(q, k, v, ONE_KERNEL, backend="eager")
    )


@pytest.mark.usefixtures("interpreter")
def test_fp32_products_follow_torchs_matmul_precision() -> None:
    cuda = torch.device("cuda")
    try:
        torch.set_float32_matmul_precision("high")
        assert triton_backend.precision_of(torch.float32, cuda) == "tf32"
        assert triton_backend._arithmetic(torch.float32, cuda) == "tf32"
        assert (
            triton_backend.precision_of(torch.bfloat16, cuda)
            == triton_backend.precision_of(torch.float32, torch.device("cpu"))
            == "ieee"
        )
    finally:
        torch.set_float32_matmul_precision("highest")
    assert triton_backend._arithmetic(torch.float32, cuda) == "float32"


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("width", [8, 32, 39, 64, 256, 512])
def test_what_is_kept_is_what_the_tiles_need(target: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """`keeps_output` knows one number, the longest group; the launcher asks the tiles themselves."""
    monkeypatch.setattr(triton_backend, "target_of", lambda device: target)
    for tokens in (1, 15, 16, 17, 32, 33, 49, 63, 64, 65, 100, 128, 129, 256, 257, 1024):
        partition = Partition.rows((1, tokens))
        q = torch.empty(1, 1, tokens, 1, width, dtype=torch.bfloat16, device="meta")
        chosen = tiles.backward(target, width, width, "bfloat16", tokens)
        assert triton_backend.keeps_output(q, q, partition) == (not plan.in_one_kernel(chosen, partition))


@pytest.mark.usefixtures("interpreter")
def test_the_target_is_the_device_s_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def target(**properties: object) -> str:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
        return triton_backend.target_of(torch.device("cuda"))

    assert target(major=9, minor=0) == "sm_90"
    assert target(major=12, minor=1) == "sm_121"
    assert triton_backend.target_of(torch.device("xpu")) == "xpu"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert target(gcnArchName="gfx942:sramecc+:xnack-") == "gfx942"


def test_what_runs_for_a_tensor_runs_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, the second; tiles are those of its architecture, launches on it and not on the current one."""
    architectures = {torch.device("cuda", 0): (8, 0), torch.device("cuda", 1): (9, 0)}
    asked: list[int | None] = []

    def properties(device: torch.device) -> SimpleNamespace:
        major, minor = architectures[device]
        return SimpleNamespace(major=major, minor=minor)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.accelerator, "device_index", asked.append)
    second = torch.device("cuda", 1)
    assert triton_backend.target_of(second) == "sm_90"
    triton_backend._on(second)
    assert asked == [1]


@pytest.fixture
def hints(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was hinted at so far, as if no problem had been seen before."""
    for cached in (triton_backend._forward_tile, triton_backend._backward_tiles):
        cached.cache_clear()
    caplog.set_level(logging.INFO, "isa_triton")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "isa_triton"]


def small(width: int) -> list[Tensor]:
    return [x.requires_grad_() for x in qkv(TINY, 1, 2, key_width=width, value_width=width, dtype=torch.bfloat16)]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_problem_without_an_entry_is_told_the_command_that_makes_one_once_a_pass(
    compiled: bool, hints: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return partitioned_attention(q, k, v, TINY, backend="triton")

    call = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    for _ in range(2):
        call(*small(24)).sum().backward()
    forward, backward = hints()
    assert (
        "no tile was made for forward of 4 tokens, K = 24, V = 24, bfloat16, but for (sm_80, K = 32, V = 32, "
        in forward
    )
    assert "no tile was made for backward of 4 tokens" in backward
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for hint, pass_ in ((forward, "forward"), (backward, "backward")):
        (command,) = re.findall("python -m bench (tiles search .*) looks for a better one", hint)
        parser = argparse.ArgumentParser()
        search.add_arguments(parser)
        args = parser.parse_args(command.split()[2:])
        assert (args.target, args.pass_) == ("sm_80", pass_)
        problem = options.problem(args)
        assert (problem.sizes, problem.heads, problem.bias) == ((24, 24, "bfloat16", 4), 2, False)


@pytest.mark.usefixtures("interpreter")
def test_a_problem_with_an_entry_is_told_nothing(hints: Callable[[], list[str]]) -> None:
    partitioned_attention(*small(32), TINY, backend="triton").sum().backward()
    assert hints() == []


@pytest.mark.usefixtures("interpreter")
def test_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "INSTALLED", False)
    q, k, v = qkv(ONE_KERNEL, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"cannot be had: triton is not installed \(pip install triton\)"):
        partitioned_attention(q, k, v, ONE_KERNEL, backend="triton")


@pytest.mark.usefixtures("interpreter")
def test_threads_share_the_interpreter() -> None:
    """Triton's puts its own functions in the place of its language's while a kernel runs, for all threads."""
    tensors = [[x.detach() for x in inputs(partition)] for partition in (ONE_KERNEL, TINY, TWO_PASSES, ONE_KERNEL)]
    partitions = ONE_KERNEL, TINY, TWO_PASSES, ONE_KERNEL
    alone = [call(each, partition, "triton")[0] for each, partition in zip(tensors, partitions, strict=True)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda i: call(tensors[i], partitions[i], "triton")[0], [*range(4)] * 3))
    assert all(map(torch.equal, together, alone * 3))


def test_both_passes_multiply_with_the_same_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = dict[str, str]()
    for name in ("forward", "backward"):
        run = getattr(launch, name)

        def spied(*arguments: Any, run: Any = run, name: str = name, **options: Any) -> None:
            seen[name] = signature(run).bind(*arguments, **options).arguments["precision"]
            run(*arguments, **options)

        monkeypatch.setattr(launch, name, spied)
    monkeypatch.setattr(triton_backend, "precision_of", lambda dtype, device: "tf32")
    q = torch.randn(1, 4, 6, 1, 16, requires_grad=True)
    partitioned_attention(q, q, q, Partition.rows((4, 6)), backend="triton").sum().backward()
    assert seen == {"forward": "tf32", "backward": "tf32"}
