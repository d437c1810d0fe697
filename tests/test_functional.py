"""partitioned_attention on the eager backend: equations, derivatives, layouts, transforms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

import reference
from isa_triton import Partition, partitioned_attention, partitioned_attention_with_lse
from isa_triton.backend import eager
from isa_triton.backend.contract import Call
from tests.cases import PARTITIONS, qkv, relative_error

NONE = (None,) * 4  # scales, valid, seed, table
every_partition = pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS.keys())


@pytest.fixture(params=["whole chunks", "query blocks"])
def chunking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every chunk may hold all groups, or so little that a group's queries come in several blocks."""
    if request.param == "query blocks":
        monkeypatch.setattr(eager, "_CHUNK_BYTES_CPU", 300)


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, partition: Partition, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Dense attention whose scores between groups are -inf; where a pixel sits is worked out pixel by pixel."""
    seats = [partition.seat(*pixel) for pixel in product(*map(range, q.shape[1:-2]))]
    group, token = torch.tensor(seats).T
    queries, keys, values = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))  # [B, heads, H W, width]
    scores = scale * queries @ keys.mT
    if bias is not None:
        scores = scores + bias[:, token[:, None], token]
    scores = scores.masked_fill(group[:, None] != group, -torch.inf)
    out = (scores.softmax(-1) @ values).transpose(1, 2).reshape(v.shape)
    return out, scores.logsumexp(-1).transpose(1, 2).reshape(q.shape[:-1])


@every_partition
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.usefixtures("chunking")
def test_output_lse_and_gradients_are_the_definition(partition: Partition, with_bias: bool) -> None:
    q, k, v = qkv(partition)
    bias = torch.randn(2, partition.tokens, partition.tokens, dtype=q.dtype) if with_bias else None
    inputs = [x.requires_grad_() for x in (q, k, v, bias) if x is not None]
    expected = by_definition(q, k, v, partition, bias, 0.7)
    actual = partitioned_attention_with_lse(q, k, v, partition, bias=bias, scale=0.7)
    upstream = [torch.randn_like(x) for x in expected]
    gradients = [torch.autograd.grad(outputs, inputs, upstream) for outputs in (actual, expected)]
    for a, e in zip((*actual, *gradients[0]), (*expected, *gradients[1]), strict=True):
        assert relative_error(a, e) < 1e-13
    out = partitioned_attention(q, k, v, partition, bias=bias, scale=0.7)
    assert relative_error(out, expected[0]) < 1e-13


@pytest.mark.parametrize("size", [(6, 8), (7, 5)], ids=str)
def test_interlaced_and_local_are_the_papers_two_stages(size: tuple[int, int]) -> None:
    q, k, v = qkv(Partition.dense(size))
    long_range = partitioned_attention(q, k, v, Partition.interlaced(size, stride=(2, 4)))
    short_range = partitioned_attention(q, k, v, Partition.local(size, window=(2, 4)))
    masked = reference.masked_attention
    assert relative_error(long_range, masked(q, k, v, reference.long_range_groups, (2, 4))) < 1e-14
    assert relative_error(short_range, masked(q, k, v, reference.short_range_groups, (2, 4))) < 1e-14


def test_one_window_one_interval_and_dense_are_the_same() -> None:
    q, k, v = qkv(Partition.dense((4, 6)))
    dense = partitioned_attention(q, k, v, Partition.dense((4, 6)))
    assert relative_error(dense, reference.dense_attention(q, k, v)) < 1e-14
    assert torch.equal(dense, partitioned_attention(q, k, v, Partition.local((4, 6), window=(4, 6))))
    assert torch.equal(dense, partitioned_attention(q, k, v, Partition.interlaced((4, 6), stride=(1, 1))))


def test_groups_of_one_token_return_their_values() -> None:
    q, k, v = qkv(Partition.dense((4, 6)))
    assert torch.equal(partitioned_attention(q, k, v, Partition.local((4, 6), window=(1, 1))), v)
    assert torch.equal(partitioned_attention(q, k, v, Partition.interlaced((4, 6), stride=(4, 6))), v)


def test_disjoint_key_sets_merge_by_their_lse() -> None:
    """Rows and columns share the pixel itself: criss-cross attention from two partitions and their lse."""
    q, k, v = qkv(Partition.dense((4, 6)))
    rows, row_lse = partitioned_attention_with_lse(q, k, v, Partition.rows((4, 6)), scale=1.0)
    columns, column_lse = partitioned_attention_with_lse(q, k, v, Partition.columns((4, 6)), scale=1.0)
    weights = torch.softmax(torch.stack([row_lse, column_lse]), 0)[..., None]
    y, x = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    y, x = y.flatten(), x.flatten()
    copies = (y[:, None] == y).double() + (x[:, None] == x).double()  # the pixel itself is counted twice here
    queries, keys, values = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    affinity = (queries @ keys.mT).exp() * copies
    expected = (affinity / affinity.sum(-1, keepdim=True) @ values).transpose(1, 2).reshape(v.shape)
    assert relative_error(weights[0] * rows + weights[1] * columns, expected) < 1e-13


@pytest.mark.slow
@every_partition
@pytest.mark.usefixtures("chunking")
def test_first_and_second_derivatives_are_right_forward_and_reverse(partition: Partition) -> None:
    inputs = [x.requires_grad_() for x in qkv(partition, batch=1)]
    inputs.append(torch.randn(2, partition.tokens, partition.tokens, dtype=torch.float64, requires_grad=True))

    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return partitioned_attention_with_lse(q, k, v, partition, bias=bias, scale=0.7)

    assert gradcheck(attention, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(attention, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_derivatives_without_bias_or_lse_are_right_in_every_entry() -> None:
    partition = Partition.interlaced((3, 2), stride=(2, 1))
    inputs = [x.requires_grad_() for x in qkv(partition, batch=1, heads=1, key_width=1, value_width=2)]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return partitioned_attention(q, k, v, partition)

    assert gradcheck(attention, inputs, check_forward_ad=True)
    assert gradgradcheck(attention, inputs, check_fwd_over_rev=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "NCHW": lambda x: x.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2),
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "heads first": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "batch last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["interlaced-ragged", "local"])
def test_strides_do_not_matter(layout: str, name: str) -> None:
    partition = PARTITIONS[name]
    inputs, upstream = qkv(partition), qkv(partition)[2]
    bias = torch.randn(2, partition.tokens, partition.tokens, dtype=torch.float64)
    results = []
    for relayout in (torch.Tensor.clone, LAYOUTS[layout]):
        leaves = [relayout(x).detach().requires_grad_() for x in inputs]
        b = (
            bias.clone().requires_grad_()
            if relayout is torch.Tensor.clone
            else bias.mT.contiguous().mT.requires_grad_()
        )
        out = partitioned_attention(*leaves, partition, bias=b)
        results.append((out, *torch.autograd.grad(out, [*leaves, b], relayout(upstream))))
    for a, e in zip(*results, strict=True):
        assert relative_error(a, e) < 1e-14


def test_expanded_inputs_and_gradients_are_those_they_repeat() -> None:
    partition = PARTITIONS["local-ragged"]
    q, k, v = qkv(partition, batch=1)
    wide = [x.expand(3, *x.shape[1:]) for x in (q, k, v)]
    assert torch.equal(partitioned_attention(*wide, partition)[2:], partitioned_attention(q, k, v, partition))
    leaf = q.clone().requires_grad_()
    partitioned_attention(leaf, k, v, partition).sum().backward()
    other = q.clone().requires_grad_()
    out = partitioned_attention(other, k, v, partition)
    out.backward(torch.ones_like(out))
    assert leaf.grad is not None
    assert other.grad is not None
    assert torch.equal(leaf.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("logits", [1.0, 1e4])
def test_error_stays_within_the_budget_of_the_same_precision(dtype: torch.dtype, logits: float) -> None:
    """Against fp64: at most twice the error of the plain formula in the same dtype, plus one rounding."""
    partition = Partition.interlaced((12, 20), stride=(5, 3))
    low = [x.to(dtype) for x in qkv(partition, key_width=16, value_width=24)]
    exact = [x.double() for x in low]
    scale = logits / 4
    expected, expected_lse = by_definition(*exact, partition, None, scale)
    eager_error = (by_definition(*low, partition, None, scale)[0].double() - expected).abs().max()
    out, lse = partitioned_attention_with_lse(*low, partition, scale=scale)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    rounding = torch.finfo(dtype).eps * expected.abs().max()
    assert (out.double() - expected).abs().max() <= 2 * eager_error + rounding
    assert (lse.double() - expected_lse).abs().max() <= 8 * torch.finfo(dtype).eps * expected_lse.abs().max()
    assert partitioned_attention_with_lse(*exact, partition)[1].dtype == torch.float64


@pytest.mark.parametrize("chunk_bytes", [8 << 20, 4096])
@pytest.mark.parametrize("name", PARTITIONS)
def test_sdpa_serves_where_it_is_faster_and_agrees(
    name: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to a width of 128, in one chunk or in many; with lse there is none, and the same result."""
    monkeypatch.setattr(eager, "_CHUNK_BYTES_CPU", chunk_bytes)
    sdpa = Mock(wraps=eager.F.scaled_dot_product_attention)
    monkeypatch.setattr(eager.F, "scaled_dot_product_attention", sdpa)
    for width in (8, 136):
        q, k, v = qkv(PARTITIONS[name], key_width=width, value_width=width)
        bias = torch.randn(2, PARTITIONS[name].tokens, PARTITIONS[name].tokens, dtype=q.dtype)
        for b in (bias, None):
            sdpa.reset_mock()
            out = partitioned_attention(q, k, v, PARTITIONS[name], bias=b)
            assert sdpa.called == (width == 8)
            assert relative_error(out, partitioned_attention_with_lse(q, k, v, PARTITIONS[name], bias=b)[0]) < 1e-12


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_empty_batches_and_no_heads_give_empty_results(backend: str) -> None:
    partition = PARTITIONS["local-ragged"]
    for batch, heads, width in ((0, 2, 5), (2, 0, 5), (0, 2, 3), (2, 0, 3)):
        leaves = [x.float().requires_grad_() for x in qkv(partition, batch=batch, heads=heads, value_width=width)]
        bias = torch.zeros(heads, partition.tokens, partition.tokens, requires_grad=True)
        assert partitioned_attention(*leaves, partition, bias=bias, backend=backend).shape == leaves[2].shape
        out, lse = partitioned_attention_with_lse(*leaves, partition, bias=bias, backend=backend)
        assert out.shape == leaves[2].shape
        assert lse.shape == leaves[0].shape[:-1]
        out.sum().backward()
        assert leaves[0].grad is not None
        assert leaves[0].grad.shape == leaves[0].shape


def test_scores_never_exceed_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made on the way holds one group's scores of one head, however many groups there are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.numel = max(self.numel, result.untyped_storage().nbytes() // result.element_size())
            return result

    monkeypatch.setattr(eager, "_CHUNK_BYTES_CPU", 1 << 10)
    partition = Partition.local((32, 48), window=(16, 16))
    q, k, v = qkv(partition, batch=1, heads=3, key_width=1, value_width=1)
    with Largest() as largest:
        partitioned_attention(q, k, v, partition)
    assert largest.numel <= max(256 * 256, q.numel())


def test_transforms_of_torch_func_agree_with_autograd() -> None:
    partition = PARTITIONS["interlaced-ragged"]
    q, k, v = qkv(partition, batch=1, heads=1, key_width=2, value_width=2)
    bias = torch.randn(1, partition.tokens, partition.tokens, dtype=torch.float64)

    def loss(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        out, lse = partitioned_attention_with_lse(q, k, v, partition, bias=bias)
        return out.sin().sum() + lse.cos().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, bias)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, e in zip(torch.func.grad(loss, argnums=(0, 1, 2))(q, k, bias), expected, strict=True):
        assert relative_error(a, e) < 1e-14
    batched = torch.func.vmap(torch.func.grad(loss, argnums=(0, 2)), in_dims=(1, None, 0))
    dq, dbias = batched(torch.stack([q, 2 * q], 1), k, torch.stack([bias, bias]))
    assert relative_error(dq[0], expected[0]) < 1e-14
    assert relative_error(dbias[0], expected[2]) < 1e-14
    forward, reverse = (f(lambda q: loss(q, k, bias))(q) for f in (torch.func.jacfwd, torch.func.jacrev))
    assert relative_error(forward, reverse) < 1e-13
    hessian = torch.func.hessian(lambda q: loss(q, k, bias))(q).reshape(q.numel(), q.numel())
    assert relative_error(hessian, hessian.T) < 1e-13


def test_attention_compiles_in_one_graph_with_the_partition_hidden_in_an_operator() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = (q.shape[1], q.shape[2])
        return partitioned_attention(q, k, v, Partition.interlaced(size, stride=(2, 3))).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for size in ((4, 7), (6, 9)):
        leaves = [x.requires_grad_() for x in qkv(Partition.dense(size))]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        for a, e in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
            assert relative_error(a, e) < 1e-14
    assert "isa_triton.forward" in "".join(str(part.code) for part in graphs[0].modules())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_operators_pass_opcheck(with_bias: bool, transposed: bool) -> None:
    partition = PARTITIONS["interlaced-ragged"]
    q, k, v = (x.float() for x in qkv(partition))
    if transposed:
        q, k, v = (x.transpose(1, 4).contiguous().transpose(1, 4) for x in (q, k, v))
    bias = torch.randn(2, partition.tokens, partition.tokens) if with_bias else None
    axes = Call(0.5, partition, False, "eager").flat()[1]
    for with_lse in (False, True):
        torch.library.opcheck(
            torch.ops.isa_triton.forward.default, (q, k, v, bias, *NONE, 0.5, axes, with_lse, "eager")
        )
        dlse = torch.randn(q.shape[:-1]) if with_lse else None
        arguments = (q, k, v, bias, *NONE, None, None, torch.randn_like(v), dlse, 0.5, axes, with_lse, "eager")
        torch.library.opcheck(torch.ops.isa_triton.backward.default, arguments)


@every_partition
def test_flops_of_operators_and_of_matmuls_agree_with_the_pairs(partition: Partition) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(partition))
    seats = [partition.seat(*pixel)[0] for pixel in product(*map(range, partition.size))]
    pairs = sum(seats.count(group) for group in seats)
    assert partition.pairs == pairs
    forward, backward = 2 * 2 * 2 * pairs * (3 + 5), 2 * 2 * 2 * pairs * (3 * 3 + 2 * 5)
    axes = Call(1.0, partition, False, "eager").flat()[1]
    for attention in (
        lambda: partitioned_attention(q, k, v, partition),
        lambda: torch.ops.isa_triton.forward.default(q, k, v, None, *NONE, 1.0, axes, False, "eager")[0],
    ):
        with FlopCounterMode(display=False) as counter:
            out = attention()
        assert counter.get_total_flops() == forward
        with FlopCounterMode(display=False) as counter:
            out.backward(torch.ones_like(out))
        assert counter.get_total_flops() == backward
    with FlopCounterMode(display=False) as counter:
        torch.ops.isa_triton.backward.default(q, k, v, None, *NONE, None, None, v, None, 1.0, axes, False, "eager")
    assert counter.get_total_flops() == backward


def test_autocast_lowers_the_inputs_together() -> None:
    partition = PARTITIONS["local"]
    q, k, v = qkv(partition, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert partitioned_attention(q, k.bfloat16(), v, partition).dtype == torch.bfloat16
        assert partitioned_attention(*qkv(partition), partition).dtype == torch.float64
