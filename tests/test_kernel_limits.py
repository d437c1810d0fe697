"""The kernels where a limit bites: determinism, traffic, offsets beyond 31 bits, nothing to do, bounded memory."""

from __future__ import annotations

from math import ceil, prod
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from bench.cases import Pair
from isa_triton.backend.kernels import launch, plan
from isa_triton.partition import Partition
from isa_triton.tiles import BackwardTiles, Tile
from tests import guard
from tests.kernel_cases import assert_within_budget, formula, inputs_of, launched, of_groups, tiles_of

pytestmark = pytest.mark.usefixtures("kernels")

FORMS = ["one block", "many blocks", "many blocks, split"]
TOKENS = {"one block": (3, 5), "many blocks": (3, 6), "many blocks, split": (3, 6)}  # 16 are the smallest block


@pytest.mark.parametrize("form", FORMS)
def test_two_runs_agree_to_the_bit(form: str) -> None:
    case = of_groups("interlaced", TOKENS[form], (1, 2), (0, 1), (24, 39), heads=2, bias=True, dtype=torch.float16)
    inputs, tiles = inputs_of(case), tiles_of(form, case.partition.tokens)
    first, second = (launched(case, tiles, inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", FORMS[:2])
def test_a_constant_added_to_the_bias_is_added_to_lse_and_changes_nothing_else(form: str) -> None:
    """Far below and far above what exp holds, also in the rows of queries that a ragged group lacks."""
    case = of_groups("interlaced", TOKENS[form], (1, 2), (0, 1), (24, 39), heads=2, bias=True)
    inputs, tiles = inputs_of(case), tiles_of(form, case.partition.tokens)
    constant = torch.tensor([-300.0, 300.0])  # of two heads
    raised = inputs | {"bias": inputs["bias"] + constant[:, None, None]}
    expected, got = launched(case, tiles, inputs), launched(case, tiles, raised)
    got["lse"] -= constant
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize(("kind", "form"), [("local", FORMS[0]), ("interlaced", FORMS[1]), ("local", FORMS[2])])
def test_programs_in_any_order_give_the_same_bits(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "IN_TURNS", 4)  # of dbias: a program sums over several groups
    case = of_groups(kind, TOKENS[form], (1, 3), (0, 2), (24, 39), heads=2, bias=True, dtype=torch.float16)
    inputs, tiles = inputs_of(case), tiles_of(form, case.partition.tokens)
    in_order = launched(case, tiles, inputs)
    with guard.shuffled(seed=0):
        shuffled = launched(case, tiles, inputs)
    assert all(torch.equal(in_order[name], shuffled[name]) for name in in_order)


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("widths", [(256, 512), (64, 64), (39, 39)])
def test_traffic_of_a_group_that_fits_is_compulsory(widths: Pair) -> None:
    case = of_groups("interlaced", (8, 8), (1, 2), widths=widths, dtype=torch.float16)
    inputs, (tile, tiles) = inputs_of(case), tiles_of("one block", 64)
    q, k, v, do = (inputs[name] for name in ("q", "k", "v", "do"))
    with guard.watch() as memory:
        launch.forward(q, k, v, None, torch.empty_like(v), None, case.scale, case.partition, tile)
    assert memory.traffic() <= 1.02 * sum(t.nbytes for t in (q, k, v, v))
    with guard.watch() as memory:
        launch.backward(q, k, v, None, None, None, do, None, torch.empty_like(q), torch.empty_like(k),
                        torch.empty_like(v), None, None, case.scale, case.partition, tiles)  # fmt: skip
    assert len(memory.launches) == 1
    assert memory.traffic() <= 1.02 * sum(t.nbytes for t in (q, k, v, do, q, k, v))


def test_lse_and_its_gradient_may_be_left_out() -> None:
    for form in FORMS[:2]:
        case = of_groups("local", TOKENS[form], (2, 1))
        inputs, partition, (tile, tiles) = inputs_of(case), case.partition, tiles_of(form, case.partition.tokens)
        q, k, v, do = (inputs[name] for name in ("q", "k", "v", "do"))
        out, lse, delta = torch.empty_like(v), torch.empty(q.shape[:4]), torch.empty(q.shape[:4])
        launch.forward(q, k, v, None, out, None, case.scale, partition, tile)
        launch.forward(q, k, v, None, torch.empty_like(v), lse, case.scale, partition, tile)
        got = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        launch.backward(q, k, v, None, out, lse, do, None, *got, delta, None, case.scale, partition, tiles)
        exact = formula(case, inputs | {"dlse": torch.zeros(q.shape[:4])}, torch.float64)
        for name, result in zip(("out", "dq", "dk", "dv"), (out, *got), strict=True):
            torch.testing.assert_close(result.double(), exact[name], atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("interpreter")
def test_an_empty_batch_launches_nothing() -> None:
    case = of_groups("local", (4, 4), (2, 1), maps=0, bias=True)
    inputs, (tile, tiles) = inputs_of(case), tiles_of("one block", 16)
    q, k, v, do, bias = (inputs[name] for name in ("q", "k", "v", "do", "bias"))
    partials = torch.empty(plan.bias_partials_shape(0, 1, case.partition, tiles))
    with guard.watch() as memory:
        launch.forward(q, k, v, bias, v.clone(), None, 1.0, case.partition, tile)
        launch.backward(q, k, v, bias, None, None, do, None, q.clone(), k.clone(), v.clone(), None, partials,
                        1.0, case.partition, tiles)  # fmt: skip
    assert not memory.launches
    assert torch.equal(partials.sum(0), torch.zeros(1, 16, 16))


@pytest.mark.parametrize("form", [FORMS[0], pytest.param(FORMS[2], marks=pytest.mark.slow)])
@pytest.mark.parametrize("far", ["batch", "row", "column", "head", "channel"])
def test_offsets_may_exceed_31_bits(far: str, form: str) -> None:
    """Of every index there are three or more: a stride is within 31 bits, and the largest index times it is not."""
    case = of_groups("local", (3, 4), (2, 2), (1, 1), (3, 3), heads=3, maps=3, dtype=torch.float16)
    shape = (case.maps, *case.size, case.heads, 3)
    dim = ["batch", "row", "column", "head", "channel"].index(far)
    strides = torch.empty(shape).stride()
    # odd, or kernels would count it in units of several elements
    distant = tuple((3 << 30) // (shape[dim] - 1) - 2 | 1 if i == dim else 2 * s for i, s in enumerate(strides))
    assert distant[dim] < 2**31 < (shape[dim] - 1) * distant[dim]

    def spread(tensor: Tensor) -> Tensor:
        try:
            memory = torch.empty((3 << 30) + 4096, dtype=torch.float16)  # virtual on a CPU: only touched pages exist
        except torch.OutOfMemoryError:
            pytest.skip("eight tensors of 6 GB do not fit on this GPU")
        return memory.as_strided(shape, distant).copy_(tensor)

    inputs = inputs_of(case)
    exact = formula(case, inputs, torch.float64)
    q, k, v, do = (spread(inputs[name]) for name in ("q", "k", "v", "do"))
    out, dq, dk, dv = (spread(torch.full(shape, float("nan"))) for _ in range(4))
    lse, delta = torch.empty(shape[:4]), torch.empty(shape[:4])
    tile, tiles = tiles_of(form, case.partition.tokens)
    with guard.watch(overflow=True):
        launch.forward(q, k, v, None, out, lse, case.scale, case.partition, tile)
        launch.backward(q, k, v, None, out, lse, do, inputs["dlse"], dq, dk, dv, delta, None,
                        case.scale, case.partition, tiles)  # fmt: skip
    for name, result in {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}.items():
        torch.testing.assert_close(result.double(), exact[name], atol=2e-2, rtol=2e-2)


def test_partial_sums_of_dbias_stay_bounded() -> None:
    tile = Tile(64, 64, 32, 32)
    tiles = BackwardTiles(tile, tile, tile, None, tile)
    for size, window in (((56, 56), (7, 7)), ((512, 512), (8, 8)), ((96, 96), (12, 12)), ((64, 64), (64, 64))):
        partition = Partition.local(size, window)
        slots, heads, *pairs = plan.bias_partials_shape(64, 8, partition, tiles)
        programs = slots * heads * prod(ceil(n / 64) for n in pairs)
        assert slots == 1 or programs <= plan.IN_TURNS


@pytest.mark.usefixtures("interpreter")
def test_a_group_as_large_as_its_block_is_loaded_as_if_it_were_smaller() -> None:
    """16 tokens in blocks of 16, in three chunks of either width: scores are formed once, not chunk by chunk."""
    case = of_groups("local", (4, 4), (1, 2), widths=(39, 39), heads=2)
    inputs, tile = inputs_of(case), Tile(16, 16, 16, 16)
    q, k, v, do = (inputs[name] for name in ("q", "k", "v", "do"))
    out, lse, delta = torch.empty_like(v), torch.empty(q.shape[:4]), torch.empty(q.shape[:4])
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    tiles = BackwardTiles(None, tile, tile, None, tile)
    with guard.watch() as memory, patch.object(launch, "interpret", wraps=launch.interpret) as interpreted:
        launch.forward(q, k, v, None, out, lse, case.scale, case.partition, tile._replace(block_m=32))
        launch.backward(q, k, v, None, out, lse, do, None, dq, dk, dv, delta, None, case.scale, case.partition, tiles)
    assert [call.args[0].arguments["ONE_BLOCK"] for call in interpreted.call_args_list] == [True, True, True]
    one_each = lse.numel()
    assert [launched.loaded for launched in memory.launches] == [
        q.numel() + k.numel() + v.numel(),
        q.numel() + 2 * k.numel() + v.numel() + do.numel() + one_each,  # lse; k for the scores, and for dq
        2 * q.numel() + k.numel() + v.numel() + 2 * do.numel() + 2 * one_each,  # lse and delta; q for dk, do for dv
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_more_heads_than_partial_sums_have_one_each(form: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups in turns, forward and backward, and the pass over pairs: none has a grid of no programs."""
    monkeypatch.setattr(plan, "IN_TURNS", 1)
    case = of_groups("local", TOKENS[form], (1, 2), heads=3, bias=bias)
    assert_within_budget(case, tiles_of(form, case.partition.tokens))


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("odd", ["batch", "row", "column", "head", "bias"])
def test_strides_that_nothing_divides_are_taken(odd: str, form: str) -> None:
    """All strides but one are multiples of 8, which kernels count in; a bias is cut out of one of more tokens."""
    case = of_groups("interlaced", TOKENS[form], (2, 2), widths=(16, 16), heads=2, maps=3, bias=True)
    inputs = inputs_of(case)
    dims = ["batch", "row", "column", "head"]

    def spread(x: Tensor) -> Tensor:
        strides, step = [1], 16
        for size in reversed(x.shape[:-1]):
            strides.insert(0, step + (dims[x.dim() - 1 - len(strides)] == odd))
            step = size * (step + 16)
        memory = torch.full((1 + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)),), float("nan"))
        return memory.as_strided(x.shape, strides).copy_(x)

    for name in ("q", "k", "v", "do"):
        inputs[name] = spread(inputs[name])
    tokens, wide = case.partition.tokens, 32
    bias = torch.full((case.heads, wide, wide), float("nan"))[:, :tokens, :tokens]
    inputs["bias"] = bias.copy_(inputs["bias"]) if odd == "bias" else inputs["bias"]
    assert_within_budget(case, tiles_of(form, tokens), inputs)
