"""Rows without any key to attend are zero, as torch has it, their lse minus infinity; no finite bias gives NaN."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from isa_triton import Partition, partitioned_attention, partitioned_attention_with_lse
from isa_triton.backend import plain
from isa_triton.backend.contract import Inputs
from tests import guard
from tests.cases import assert_same, qkv, relative_error
from tests.kernel_cases import FORMS, inputs_of, launched, of_groups, tiles_of

pytestmark = pytest.mark.usefixtures("kernels")

RAGGED = Partition.interlaced((5, 7), stride=(2, 3))  # groups of up to 3 x 3 tokens
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_route = pytest.mark.parametrize("route", ["eager", "plain", "triton"])
every_form = pytest.mark.parametrize("form", FORMS)


def attention(route: str, partition: Partition) -> Attention:
    """out and lse of q, k, v and bias by one of the ways to compute them."""
    if route == "plain":
        return lambda q, k, v, bias: plain.attention(Inputs(q, k, v, bias), q.shape[-1] ** -0.5, partition)
    return lambda q, k, v, bias: partitioned_attention_with_lse(q, k, v, partition, bias=bias, backend=route)


def biases(partition: Partition, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of 2 heads: in the first, tokens 1 and 4 attend no key and token 2 one; and which rows [heads, T] have none."""
    bias = torch.randn(2, partition.tokens, partition.tokens, dtype=dtype)
    keyless = torch.zeros(bias.shape[:2], dtype=torch.bool)
    keyless[0, [1, 4]] = True
    bias[keyless] = -torch.inf
    bias[0, 2, 1:] = -torch.inf
    return bias, keyless


def on_map(rows: Tensor, partition: Partition) -> Tensor:
    """What the tokens' rows [heads, T] are, pixel by pixel: [H, W, heads]."""
    height, width = partition.size
    pixels = [rows[:, partition.seat(y, x)[1]] for y in range(height) for x in range(width)]
    return torch.stack(pixels).unflatten(0, (height, width))


def results(attend: Attention, inputs: list[Tensor], do: Tensor, dlse: Tensor) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    with np.errstate(all="ignore"):  # the interpreter is numpy, which warns of the logarithm of 0
        out, lse = attend(*leaves)
        gradients = torch.autograd.grad((out, lse), leaves, (do, dlse.to(lse.dtype)))
    return dict(zip(("out", "lse", "dq", "dk", "dv", "dbias"), (out.detach(), lse.detach(), *gradients), strict=True))


def assert_zero(got: dict[str, Tensor], others: dict[str, Tensor], rows: Tensor, keyless: Tensor) -> None:
    """Rows [H, W, heads] without keys are; all else is as in `others`, where these rows attend without gradients."""
    assert torch.equal(got["lse"].isneginf(), rows.expand_as(got["lse"]))
    assert not got["dq"][:, rows].any()
    assert not got["dbias"][keyless].any()
    others = others | {"out": others["out"].masked_fill(rows[..., None], 0)}
    got, others = (x | {"lse": x["lse"].masked_fill(rows, 0)} for x in (got, others))
    assert_same(got, others, tolerance=4 * torch.finfo(got["out"].dtype).eps)


@every_route
@every_dtype
def test_rows_without_keys_are_zero_and_change_nothing_else(route: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(RAGGED, batch=1))
    (bias, keyless), do, dlse = biases(RAGGED, dtype), torch.randn_like(v), torch.randn(q.shape[:-1])
    rows = on_map(keyless, RAGGED)
    got = results(attention(route, RAGGED), [q, k, v, bias], do, dlse)
    bias, do, dlse = (
        bias.masked_fill(keyless[..., None], 0),
        do.masked_fill(rows[..., None], 0),
        dlse.masked_fill(rows, 0),
    )
    assert_zero(got, results(attention(route, RAGGED), [q, k, v, bias], do, dlse), rows, keyless)


@pytest.mark.slow
@every_form
@every_dtype
def test_the_same_in_kernels_of_every_form(form: str, dtype: torch.dtype) -> None:
    case = of_groups("interlaced", (3, 6), (1, 2), (0, 1), (24, 39), heads=2, bias=True, dtype=dtype)
    tiles, inputs = tiles_of(form, case.partition.tokens), inputs_of(case)
    bias, keyless = biases(case.partition, dtype)
    rows = on_map(keyless, case.partition)
    with np.errstate(all="ignore"):
        got = launched(case, tiles, inputs | {"bias": bias})
    unasked = {"do": inputs["do"].masked_fill(rows[..., None], 0), "dlse": inputs["dlse"].masked_fill(rows, 0)}
    others = launched(case, tiles, inputs | unasked | {"bias": bias.masked_fill(keyless[..., None], 0)})
    assert_zero(got, others, rows, keyless)


@pytest.mark.parametrize("width", [4, 6])
def test_without_lse_the_output_is_the_same(width: int) -> None:
    """By torch's scaled_dot_product_attention where K = V, by ours elsewhere."""
    q, k, v = qkv(RAGGED, key_width=4, value_width=width)
    bias, keyless = biases(RAGGED, q.dtype)
    out = partitioned_attention(q, k, v, RAGGED, bias=bias)
    assert not out[:, on_map(keyless, RAGGED)].any()
    assert relative_error(out, partitioned_attention_with_lse(q, k, v, RAGGED, bias=bias)[0]) < 1e-14


@every_route
def test_rows_without_keys_are_those_of_torch(route: str) -> None:
    if guard.COMPILED:
        pytest.skip("what torch's own attention does without keys is not the same in all that it has for GPUs")
    partition = Partition.dense((2, 4))
    q, k, v = (x.float() for x in qkv(partition, value_width=3))
    (bias, _), do = biases(partition, torch.float32), torch.randn_like(v)

    def by_torch(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys, values = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias.expand(2, -1, -1, -1))
        return out.transpose(1, 2).reshape(v.shape), q.new_zeros(q.shape[:-1], requires_grad=True)

    dlse = torch.zeros(q.shape[:-1])
    got, expected = (results(f, [q, k, v, bias], do, dlse) for f in (attention(route, partition), by_torch))
    del got["lse"], expected["lse"]
    assert_same(got, expected, tolerance=1e-6)


@every_route
def test_a_key_that_lies_outside_the_map_is_none(route: str) -> None:
    """Only the last pixel of a window may be attended, which the windows at the far edges lack."""
    partition = Partition.local((5, 7), window=(3, 4))
    q, k, v = (x.float() for x in qkv(partition, value_width=3))
    bias = torch.full((2, 12, 12), -torch.inf)
    bias[..., -1] = 0.0
    with np.errstate(all="ignore"):
        out, lse = attention(route, partition)(q, k, v, bias)
    whole = torch.zeros(5, 7, dtype=torch.bool)
    whole[:3, :4] = True
    assert torch.equal(out[:, whole], v[:, 2:3, 3].expand(-1, 12, -1, -1))
    assert not out[:, ~whole].any()
    assert bool(lse[:, whole].isfinite().all())
    assert bool(lse[:, ~whole].isneginf().all())


def extremes(tokens: int, dtype: torch.dtype) -> Tensor:
    """Biases of 2 heads whose rows 0 to 3 hold the dtype's lowest number, its largest, and either beside others."""
    limits, bias = torch.finfo(dtype), torch.randn(2, tokens, tokens, dtype=dtype)
    bias[:, 0], bias[:, 1], bias[:, 2, 1:], bias[:, 3, 1:] = limits.min, limits.max, limits.min, -torch.inf
    bias[:, 3, 0], bias[:, 4, 2], bias[:, 5, 5] = limits.min, limits.max, -1e4
    return bias


@every_route
@every_dtype
def test_finite_biases_give_finite_numbers(route: str, dtype: torch.dtype) -> None:
    """And the right ones, but for what a gradient of lse adds: it is exp(s - lse), and fp32 holds neither to 1."""
    q, k, v = (x.to(dtype) for x in qkv(RAGGED, batch=1))
    inputs, attend, do, zero = (
        [q, k, v, extremes(9, dtype)],
        attention(route, RAGGED),
        torch.randn_like(v),
        q[..., 0] * 0,
    )
    assert all(bool(x.isfinite().all()) for x in results(attend, inputs, do, torch.ones_like(zero)).values())
    got = {name: result.double() for name, result in results(attend, inputs, do, zero).items()}
    exact = results(attention("eager", RAGGED), [x.double() for x in inputs], do.double(), zero)
    assert_same(got, exact, tolerance=8 * torch.finfo(dtype).eps)


@pytest.mark.slow
@every_form
@every_dtype
def test_finite_biases_give_finite_numbers_in_kernels_of_every_form(form: str, dtype: torch.dtype) -> None:
    case = of_groups("interlaced", (3, 6), (1, 2), (0, 1), (24, 39), heads=2, bias=True, dtype=dtype)
    with np.errstate(all="ignore"):
        got = launched(case, tiles_of(form, 18), inputs_of(case) | {"bias": extremes(18, dtype)})
    assert [name for name, result in got.items() if not result.isfinite().all()] == []


@every_form
def test_scores_that_rounding_moves_by_hundreds_give_finite_gradients(form: str) -> None:
    """Passes form them in different orders, so that one may be above the lse that another pass has summed."""
    case = of_groups("interlaced", (3, 6), (1, 2), (0, 1), (24, 39), heads=2, bias=True, logits=1e9)
    with np.errstate(all="ignore"):
        got = launched(case, tiles_of(form, 18), inputs_of(case))
    assert [name for name, result in got.items() if not result.isfinite().all()] == []


@pytest.mark.slow
def test_derivatives_past_rows_without_keys_are_right_forward_and_reverse() -> None:
    bias, keyless = biases(RAGGED, torch.float64)
    rows, inputs = on_map(keyless, RAGGED), [x.requires_grad_() for x in qkv(RAGGED, batch=1)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = partitioned_attention_with_lse(q, k, v, RAGGED, bias=bias)
        return out, lse.masked_fill(rows, 0)

    assert gradcheck(attend, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(attend, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compilers_keep_the_rule(backend: str) -> None:
    q, k, v = (x.float() for x in qkv(RAGGED))
    (bias, _), do, dlse = biases(RAGGED, torch.float32), torch.randn_like(v), torch.randn(q.shape[:-1])
    attend = attention(backend, RAGGED)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    got, expected = (results(f, [q, k, v, bias], do, dlse) for f in (compiled, attend))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_key_sets_that_may_be_empty_merge_by_their_lse() -> None:
    """One side's keys alone, the other's, both, and none at all; with gradients."""
    partition = Partition.dense((2, 2))
    q, k, v = (x.requires_grad_() for x in qkv(partition, value_width=3))
    allowed = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    sides = [allowed & torch.tensor(side) for side in ([True, True, False, False], [False, False, True, True])]

    def attend(keys: Tensor) -> tuple[Tensor, Tensor]:
        bias = torch.zeros(2, 4, 4, dtype=q.dtype).masked_fill(~keys, -torch.inf)
        return partitioned_attention_with_lse(q, k, v, partition, bias=bias)

    (first, first_lse), (second, second_lse) = map(attend, sides)
    whole, whole_lse = attend(allowed)
    both = torch.stack([first_lse, second_lse])
    weights = torch.softmax(both.clamp(min=torch.finfo(both.dtype).min), 0)[..., None]
    merged = weights[0] * first + weights[1] * second
    assert relative_error(merged, whole) < 1e-14
    assert not merged[:, 1, 1].any()
    assert torch.equal(both.logsumexp(0).isneginf(), whole_lse.isneginf())
    do = torch.randn_like(merged)
    for got, expected in zip(*(torch.autograd.grad(x, (q, k, v), do) for x in (merged, whole)), strict=True):
        assert relative_error(got, expected) < 1e-14
