"""Where numbers go wrong in attention: constant rows, huge logits, overflow, NaN, long sums; on both backends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from isa_triton import Partition, partitioned_attention, partitioned_attention_with_lse
from isa_triton.backend import eager
from reference.budget import allowed_error
from tests.cases import qkv, relative_error

pytestmark = pytest.mark.usefixtures("kernels")
both_backends = pytest.mark.parametrize("backend", ["eager", "triton"])
RAGGED = Partition.interlaced((5, 7), stride=(2, 3))


def pixels_of_group(partition: Partition, group: int) -> Tensor:
    """A mask [H, W] of a group's pixels."""
    mask = torch.zeros(partition.size, dtype=torch.bool)
    for token in range(partition.tokens):
        y, x, inside = partition.coordinates(group, token)
        if inside:
            mask[y, x] = True
    return mask


@both_backends
def test_equal_keys_give_the_mean_of_the_values(backend: str) -> None:
    q, k, v = qkv(RAGGED, dtype=torch.float32)
    out, lse = partitioned_attention_with_lse(q, torch.ones_like(k), v, RAGGED, backend=backend)
    for group in range(RAGGED.groups):
        mask = pixels_of_group(RAGGED, group)
        mean = v[:, mask].mean(1, keepdim=True)
        assert relative_error(out[:, mask], mean.expand_as(out[:, mask])) < 1e-6
        expected = q[:, mask].sum(-1) * q.shape[-1] ** -0.5 + mask.sum().log()
        assert relative_error(lse[:, mask], expected) < 1e-6


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_unscaled_scores_may_be_beyond_the_dtype(backend: str, dtype: torch.dtype) -> None:
    """q k^T is about 1e6, which fp16 does not have; scale makes it 1."""
    q, k, v = (300 * x.to(dtype) if i < 2 else x.to(dtype) for i, x in enumerate(qkv(RAGGED, key_width=16)))
    out = partitioned_attention(q, k, v, RAGGED, scale=1e-6, backend=backend)
    exact = partitioned_attention(q.double(), k.double(), v.double(), RAGGED, scale=1e-6)
    assert relative_error(out.double(), exact) < 4 * torch.finfo(dtype).eps


@both_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_huge_logits_choose_one_value(backend: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in qkv(RAGGED, key_width=16))
    out = partitioned_attention(q, k, v, RAGGED, scale=1e4, backend=backend)
    exact = partitioned_attention(q.double(), k.double(), v.double(), RAGGED, scale=1e4)
    assert relative_error(out.double(), exact) < 0.01
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)


@both_backends
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_poison_reaches_what_depends_on_it_alone(backend: str, poison: float, name: str) -> None:
    y, x = 3, 4
    tensors = dict(zip("qkv", qkv(RAGGED, batch=1, heads=1, dtype=torch.float32), strict=True))
    clean = partitioned_attention(**tensors, partition=RAGGED, backend=backend)
    tensors[name] = tensors[name].clone()
    tensors[name][0, y, x, 0, 1] = poison
    with np.errstate(all="ignore"):  # the interpreter is numpy
        out = partitioned_attention(**tensors, partition=RAGGED, backend=backend)
    changed = (out != clean).any(-1)[0, :, :, 0]  # NaN is unequal to all
    reached = pixels_of_group(RAGGED, RAGGED.seat(y, x)[0])
    if name == "q":
        reached = torch.zeros_like(reached)
        reached[y, x] = True
    assert not (changed & ~reached).any()
    if name == "v" or poison != poison:  # a key of infinity may have score minus infinity
        assert not out[0, y, x].isfinite().all()


@both_backends
def test_poisoned_gradients_stay_in_their_group(backend: str) -> None:
    y, x = 3, 4
    q, k, v = (t.requires_grad_() for t in qkv(RAGGED, batch=1, heads=1, dtype=torch.float32))
    do = torch.ones_like(v)
    do[0, y, x] = float("nan")
    group = pixels_of_group(RAGGED, RAGGED.seat(y, x)[0])
    out = partitioned_attention(q, k, v, RAGGED, backend=backend)
    with np.errstate(all="ignore"):
        gradients = torch.autograd.grad(out, (q, k, v), do)
    assert all(gradient[0][~group].isfinite().all() for gradient in gradients)
    assert all(gradient[0][group].isnan().any() for gradient in gradients)


@both_backends
def test_a_lazy_negation_is_a_negation(backend: str) -> None:
    def lazily_negated(x: Tensor) -> Tensor:
        return torch.complex(x, x).conj().imag

    partition = Partition.local((3, 5), window=(2, 3))
    q, k, v = qkv(partition, dtype=torch.float32)
    do, bias = torch.randn_like(v), torch.randn(2, partition.tokens, partition.tokens)
    dlse = torch.randn(v.shape[:4])
    assert lazily_negated(q).is_neg()

    def derivatives(*inputs: Tensor, upstream: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = partitioned_attention_with_lse(*leaves[:3], partition, bias=leaves[3], backend=backend)
        return *out, *torch.autograd.grad(out, leaves, upstream)

    expected = derivatives(-q, -k, -v, -bias, upstream=(-do, -dlse))
    negated = lazily_negated(do), lazily_negated(dlse)
    got = derivatives(*map(lazily_negated, (q, k, v, bias)), upstream=negated)
    assert all(relative_error(g, e) < 1e-6 for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize(("backend", "tokens"), [("eager", 16384), ("triton", 320)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_long_groups_keep_the_budget(backend: str, tokens: int, dtype: torch.dtype) -> None:
    partition, some = Partition.dense((1, tokens)), slice(0, tokens, tokens // 64)  # queries that are looked at
    q, k, v = (x.to(dtype) for x in qkv(partition, batch=1, heads=1, key_width=16, value_width=16))
    out = partitioned_attention(q, k, v, partition, backend=backend)[0, 0, some, 0]

    def formula(dtype: torch.dtype) -> Tensor:
        queries, keys, values = (x[0, 0, :, 0].to(dtype) for x in (q, k, v))
        return (queries[some] @ keys.mT / 4).softmax(-1) @ values

    exact = formula(torch.float64)
    assert float((out - exact).abs().max()) <= allowed_error("out", exact, formula(dtype), dtype)


@pytest.mark.parametrize(("backend", "side"), [("eager", 200), ("triton", 10)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_bias_gradient_over_many_groups_keeps_the_budget(backend: str, side: int, dtype: torch.dtype) -> None:
    partition = Partition.local((side, side + 1), window=(2, 2))  # side^2 / 4 groups and more
    q, k, v = qkv(partition, batch=1, heads=1, key_width=4, value_width=4)
    do, bias = torch.randn_like(v), torch.randn(1, 4, 4, dtype=torch.float64)

    def dbias(dtype: torch.dtype, backend: str) -> Tensor:
        leaf = bias.to(dtype).requires_grad_()
        out = partitioned_attention(q.to(dtype), k.to(dtype), v.to(dtype), partition, bias=leaf, backend=backend)
        return torch.autograd.grad(out, leaf, do.to(dtype))[0]

    rounded = [x.to(dtype).double() for x in (q, k, v, do, bias)]
    q, k, v, do, bias = rounded
    exact = dbias(torch.float64, "eager")
    natural = float(do.norm(dim=-1).max() * v.norm(dim=-1).max()) * partition.groups**0.5
    error = float((dbias(dtype, backend).double() - exact).abs().max())
    assert error <= 4 * torch.finfo(dtype).eps * float(exact.abs().max()) + torch.finfo(dtype).eps * natural


def test_more_groups_than_two_grid_axes_hold() -> None:
    partition = Partition.local((260, 261), window=(1, 1))
    assert partition.groups > 65_535
    q, k, v = qkv(partition, batch=1, heads=1, dtype=torch.float32)
    assert torch.equal(partitioned_attention(q, k, v, partition), v)


@both_backends
def test_a_map_of_sixteen_million_pixels_is_traced(backend: str) -> None:
    partition = Partition.interlaced((4096, 4096), stride=(64, 64))
    q = torch.empty(1, 4096, 4096, 1, 256, device="meta", dtype=torch.float16, requires_grad=True)
    v = torch.empty(1, 4096, 4096, 1, 512, device="meta", dtype=torch.float16, requires_grad=True)
    if backend == "eager":
        out = torch.ops.isa_triton.forward.default(q, q, v, *[None] * 5, 1.0, partition.flat(), False, "eager")[0]
    else:
        out = partitioned_attention(q, q, v, partition, backend=backend)
    dq, dv = torch.autograd.grad(out.sum(), (q, v))
    assert (out.shape, dq.shape, dv.shape) == (v.shape, q.shape, v.shape)


def test_sums_of_halves_are_not_taken_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """dbias over thousands of groups, and lse, of many chunks in the eager backend: rounded once, at the end."""
    monkeypatch.setattr(eager, "_CHUNK_BYTES_CPU", 1 << 12)
    partition = Partition.local((128, 128), window=(1, 2))
    q, k = torch.rand(2, 1, 128, 128, 1, 16, dtype=torch.float16)
    v = torch.full_like(q, 0.37)
    v[:, :, ::2] = 0  # every group adds the same to dbias, which a half of that size would round away
    bias = torch.zeros(1, 2, 2, dtype=torch.float16, requires_grad=True)
    exact = bias.detach().double().requires_grad_()
    out, _ = partitioned_attention_with_lse(q, q * 0, v, partition, bias=bias, backend="eager")
    out_, _ = partitioned_attention_with_lse(q.double(), q.double() * 0, v.double(), partition, bias=exact)
    (dbias,), (dbias_,) = (torch.autograd.grad(y.sum() / 4, x) for y, x in ((out, bias), (out_, exact)))
    assert relative_error(dbias.double(), dbias_) < 2**-10
    _, lse = partitioned_attention_with_lse(q, k, v, partition, bias=bias, backend="eager")
    rows, columns = (x.double().view(-1, 2, 16) for x in (q, k))  # [windows, 2, 16]
    assert relative_error(lse.double().view(-1, 2), (rows @ columns.mT / 4).logsumexp(-1)) < 1e-6


@both_backends
def test_sums_of_dk_may_be_beyond_halves_on_their_way(backend: str) -> None:
    """Two heads share keys, whose gradient is 96000 from the one and -48000 from the other."""
    partition = Partition.rows((3, 2))
    q, k, v = torch.full((1, 3, 2, 2, 16), 16.0), torch.zeros(1, 3, 2, 1, 16), torch.zeros(1, 3, 2, 1, 16)
    v[:, :, 1], do = 10, torch.zeros_like(q)
    do[:, :, 0] = torch.tensor([100.0, -50.0])[:, None]
    k, v = (x.half().requires_grad_() for x in (k, v))
    with np.errstate(all="ignore"):
        out = partitioned_attention(q.half(), k, v, partition, scale=1.5, backend=backend)
        dk, dv = torch.autograd.grad(out, (k, v), do.half())
    expected = torch.tensor([-48000.0, 48000.0]).view(2, 1, 1).expand(dk.shape)
    assert relative_error(dk.float(), expected) < 2e-3
    assert relative_error(dv.float(), torch.full_like(dv, 25).float()) < 2e-3


@both_backends
def test_sums_of_dbias_may_be_beyond_halves_on_their_way(backend: str) -> None:
    """Every group's share is beyond fp16, and half of the groups have the other's negated: nothing is left."""
    partition = Partition.local((4, 6), window=(1, 2))
    q = torch.zeros(1, 4, 6, 1, 16, dtype=torch.float16)
    v, do = torch.zeros_like(q), torch.full_like(q, 300)
    v[:, :, ::2], do[:, ::2] = 300, -300
    bias = torch.zeros(1, 2, 2, dtype=torch.float16, requires_grad=True)
    with np.errstate(all="ignore"):  # of dq and dk, which are infinite
        out = partitioned_attention(q, q, v, partition, bias=bias, backend=backend)
        (dbias,) = torch.autograd.grad(out, bias, do)
    assert torch.equal(dbias, torch.zeros_like(dbias))
