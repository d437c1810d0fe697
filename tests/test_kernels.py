"""The kernels, interpreted, against the formula in fp64: over generated cases, and one by one where a limit bites."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, product
from math import ceil, prod

import pytest
import torch
from torch import Tensor

from bench.cases import laid_out
from isa_triton.backend.kernels import launch
from isa_triton.partition import Partition
from isa_triton.tiles import BackwardTiles, Tile
from reference.attention import attention_of_groups
from reference.budget import allowed_error, natural_scales
from tests import guard

Pair = tuple[int, int]
Pixels = list[range]  # of one axis: the pixels of each group


@pytest.fixture(autouse=True, scope="module")
def _interpreter() -> None:
    guard.install()


# ------------------------------------------------------------------------------------------------------------- cases
@dataclass(frozen=True)
class Case:
    """A partition of a map into `groups` groups of `tokens` tokens, and what lies on it."""

    pattern: str
    tokens: Pair
    groups: Pair
    short: Pair = (0, 0)  # pixels that the map lacks at its far ends
    widths: Pair = (32, 32)
    heads: int = 1
    maps: int = 1
    bias: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    form: str = "one"  # block a group; "many"; passes that see a "whole" group; both also with dk and dv "split"
    logits: float = 3.0
    blocks: Pair | None = None  # of queries and keys, where the form does not say
    shift: Pair = (0, 0)  # of windows: the map also lacks the first pixels of the first groups

    def __str__(self) -> str:
        named = f"{self.pattern}-{self.tokens}-{self.groups}-{self.short}-{self.widths}-{self.heads}x{self.maps}"
        named += f"-{self.shift}" * any(self.shift) + (f"-{self.blocks}" if self.blocks else "")
        return f"{named}-{'bias-' * self.bias}{str(self.dtype)[6:]}-{self.layout}-{self.form}".replace(", ", ".")

    @property
    def size(self) -> Pair:
        (t_h, t_w), (g_h, g_w), (r_h, r_w), (s_h, s_w) = self.tokens, self.groups, self.short, self.shift
        return t_h * g_h - r_h - -s_h % t_h, t_w * g_w - r_w - -s_w % t_w

    @property
    def scale(self) -> float:
        """Makes the scores of standard normal q and k about `logits` large."""
        return self.logits / self.widths[0] ** 0.5

    @property
    def partition(self) -> Partition:
        match self.pattern:
            case "local":
                return Partition.local(self.size, self.tokens, self.shift)
            case "interlaced":
                return Partition.interlaced(self.size, stride=self.groups)
            case "grid":
                return Partition.interlaced(self.size, grid=self.tokens)
            case name:
                return getattr(Partition, name)(self.size)

    def axes(self) -> Iterator[Pixels]:
        """The pixels of every group, for each axis, written without the library."""
        for size, tokens, groups, shift in zip(self.size, self.tokens, self.groups, self.shift, strict=True):
            if self.pattern in ("interlaced", "grid"):
                yield [range(a, size, groups) for a in range(groups)]
            else:
                starts = range(-(-shift % tokens), size, tokens)
                yield [range(max(start, 0), min(start + tokens, size)) for start in starts]

    def slices(self) -> Iterator[tuple[slice, slice]]:
        """The same as pairs of slices."""
        groups_h, groups_w = ([slice(r.start, r.stop, r.step) for r in axis] for axis in self.axes())
        yield from product(groups_h, groups_w)

    def tiles(self) -> tuple[Tile, BackwardTiles]:
        if self.blocks:
            tile = Tile(*self.blocks, 32, 32)
            return tile, BackwardTiles(None, tile, tile, None, tile)
        block = max(16, 1 << (prod(self.tokens) - 1).bit_length())
        if self.form == "one":
            tile = Tile(block, block, 64, 32)
            return tile, BackwardTiles(tile, tile, tile, None, tile)
        if "whole" in self.form:
            small = max(16, block // 4)
            queries, keys = Tile(small, block, 32, 128), Tile(block, small, 128, 32)
            values = keys if "split" in self.form else None
            return Tile(small, block, 64, 64), BackwardTiles(None, queries, keys, values, Tile(block, small, 64, 64))
        large = max(16, min(block // 2, 128))
        small = large if large <= 32 else large // 2
        queries, keys = Tile(large, small, 128, 64), Tile(small, large, 64, 512)
        return Tile(large, small, 64, 512), BackwardTiles(
            None, queries, keys, keys if "split" in self.form else None, Tile(large, large, 64, 64)
        )


FACTORS: dict[int, list[Pair]] = {
    1: [(1, 1)], 15: [(3, 5), (5, 3)], 16: [(2, 8), (4, 4)], 17: [(1, 17), (17, 1)], 49: [(7, 7)], 50: [(5, 10)],
    63: [(7, 9)], 64: [(8, 8), (4, 16)], 65: [(5, 13)], 144: [(12, 12), (9, 16)], 256: [(16, 16)], 300: [(15, 20)],
}  # fmt: skip
WIDTHS: list[Pair] = [(32, 32), (24, 39), (64, 64), (1, 24), (39, 39), (80, 64), (32, 80), (64, 1)]
LAYOUTS = ["contiguous", "nchw", "sliced", "heads_first", "expanded"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def generated() -> Iterator[Case]:
    """Every number of tokens in every pattern and form; the rest goes round in turns of different length."""
    turn = count()
    for tokens, pattern, form in product(FACTORS, ("local", "interlaced", "grid", "lines", "dense"), ("one", "many")):
        for uneven in (False, True):
            i = next(turn)
            factors = FACTORS[tokens][i % len(FACTORS[tokens])]
            groups = (1, 2) if tokens > 100 or form == "many" else [(2, 3), (3, 2), (1, 4)][i % 3]
            short = (0, 0)
            if pattern == "lines":
                pattern_, (factors, groups) = [("rows", ((1, tokens), (2, 1))), ("columns", ((tokens, 1), (1, 2)))][
                    i % 2
                ]
            elif pattern == "dense":
                pattern_, groups = "dense", (1, 1)
            else:
                pattern_ = pattern
                if uneven:  # fewer pixels than a token of every group, and than a group of every token
                    short = min(factors[0], groups[0], 3) - 1, min(factors[1], groups[1], 3) - 1
            yield Case(
                pattern_, factors, groups, short, WIDTHS[(i + i // 4) % 8],
                heads=3 if tokens < 60 and i % 5 == 0 else 1, maps=2 if tokens <= 17 and i % 3 == 0 else 1,
                bias=i % 7 in (1, 4, 5), dtype=DTYPES[i % 3], layout=LAYOUTS[i // 3 % 5],
                form="one" if form == "one" else ("many", "whole", "split", "many", "whole split")[i % 5],
                logits=(3.0, 30.0)[i % 11 < 4],
            )  # fmt: skip


CASES = list(dict.fromkeys(generated()))
WIDE = [
    Case("interlaced", (8, 8), (2, 1), (1, 0), (256, 512), dtype=dtype, form=form, layout=layout)
    for dtype, form, layout in product(DTYPES, ("one", "many", "split", "whole"), ("contiguous", "nchw"))
]
SHIFTED = [  # in the first ones a whole block of keys lies before the map
    Case("local", (4, 8), groups, short, (24, 39), bias=bias, dtype=dtype, form=form, shift=shift)
    for groups, short, shift in [((2, 1), (1, 0), (2, 0)), ((2, 2), (0, 3), (1, 6))]
    for form, dtype, bias in [
        ("one", torch.bfloat16, True),
        ("many", torch.float32, True),
        ("split", torch.half, False),
    ]
]
STEEP = [
    Case("interlaced", (5, 10), (2, 1), short, (64, 32), bias=bias, dtype=dtype, form=form, logits=logits)
    for short, bias, dtype, form, logits in product(
        ((0, 0), (1, 0)), (False, True), DTYPES, ("one", "many", "whole"), (300.0, 3000.0)
    )
]
UNEVEN = [  # in the first all keys are one block, and the queries three
    Case("interlaced", (5, 7), (2, 1), (1, 0), (24, 39), bias=True, form="many", blocks=blocks)
    for blocks in ((16, 64), (16, 32), (32, 16))
]


# ------------------------------------------------------------------------------------------------------------ oracle
def derivatives(inputs: dict[str, Tensor], case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients in one precision, in fp64's clothes."""
    q, k, v, do, dlse = (inputs[name].to(dtype) for name in ("q", "k", "v", "do", "dlse"))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    if case.bias:
        leaves.append(inputs["bias"].to(dtype).clone().requires_grad_())
    bias = leaves[3] if case.bias else None
    out, lse = attention_of_groups(*leaves[:3], bias, case.scale, case.slices(), case.tokens, case.shift)
    gradients = torch.autograd.grad([out, lse], leaves, [do, dlse])
    names = ["out", "lse", "dq", "dk", "dv", "dbias"]
    return dict(zip(names, (t.detach().double() for t in (out, lse, *gradients)), strict=False))


# ----------------------------------------------------------------------------------------------------------- tensors
def poisoned(case: Case, like: Tensor) -> Tensor:
    """An output, laid out as the case's inputs are unless elements share memory there, all NaN."""
    layout = "contiguous" if case.layout == "expanded" else case.layout
    return laid_out(layout, tuple(like.shape), lambda *sizes: torch.full(sizes, float("nan"), dtype=case.dtype))


def arguments(case: Case) -> dict[str, Tensor]:
    torch.manual_seed(0)
    pixels, (key, value) = (case.maps, *case.size, case.heads), case.widths
    of_gradient = "scalar" if case.layout == "expanded" else case.layout

    def make(*sizes: int) -> Tensor:
        return torch.randn(sizes).to(case.dtype)

    made = {
        name: laid_out(case.layout, (*pixels, width), make)
        for name, width in zip("qkv", (key, key, value), strict=True)
    }
    made["do"] = laid_out(of_gradient, (*pixels, value), make)
    made["dlse"] = laid_out(of_gradient, (*pixels, 1), lambda *sizes: torch.randn(sizes))[..., 0]
    if case.bias:
        tokens = case.partition.tokens
        made["bias"] = torch.randn(tokens, tokens, case.heads).to(case.dtype).permute(2, 0, 1)
    return made


def run(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward and backward on poisoned outputs; all of them must come back written."""
    q, k, v, do, dlse, bias = (inputs.get(name) for name in ("q", "k", "v", "do", "dlse", "bias"))
    assert q is not None
    assert k is not None
    assert v is not None
    partition, (tile, tiles), nan = case.partition, case.tiles(), float("nan")
    out, dq, dk, dv = (poisoned(case, x) for x in (v, q, k, v))
    lse, delta = (torch.full(q.shape[:4], nan) for _ in range(2))
    partials = None
    if bias is not None:
        partials = torch.full(launch.bias_partials_shape(case.maps, case.heads, partition, tiles), nan)
    one = launch.in_one_kernel(tiles, partition)
    assert one == (case.form == "one")

    with guard.watch() as memory:
        launch.forward(q, k, v, bias, out, lse, case.scale, partition, tile)
        saved = (None, None) if one else (out, lse)
        launch.backward(q, k, v, bias, *saved, do, dlse, dq, dk, dv, None if one else delta, partials,
                        case.scale, partition, tiles)  # fmt: skip
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    if partials is not None:
        results["dbias"] = partials.sum(0)
    for name, result in results.items():
        if name != "dbias":
            assert memory.unwritten(result) == 0, name
        assert not result.isnan().any(), name
    return results


def check(case: Case) -> None:
    """Within the budget. Scores are fp32, known to eps times their size, and a peaked softmax amplifies that, by luck
    more in one version than in the other.
    """
    inputs = arguments(case)
    got = run(case, inputs)
    exact, eager = derivatives(inputs, case, torch.float64), derivatives(inputs, case, case.dtype)
    natural = natural_scales(inputs, case.scale, case.maps * prod(case.groups))
    uncertain = torch.finfo(torch.float32).eps * float(exact["lse"].abs().max())
    for name, result in got.items():
        allowed = allowed_error(name, exact[name], eager[name], case.dtype, natural.get(name, 0.0), uncertain)
        error = float((result.double() - exact[name]).abs().max())
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_generated_case(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", WIDE, ids=str)
def test_wide_heads(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", SHIFTED, ids=str)
def test_shifted_windows(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", STEEP, ids=str)
def test_large_logits(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", UNEVEN, ids=str)
def test_blocks_of_queries_and_keys_may_differ(case: Case) -> None:
    check(case)


def test_the_cases_are_many_and_cover_what_they_promise() -> None:
    assert len(CASES) + len(WIDE) + len(STEEP) >= 300
    assert {c.partition.tokens for c in CASES} == set(FACTORS)
    for field, values in {"widths": WIDTHS, "dtype": DTYPES, "layout": LAYOUTS, "heads": [1, 3]}.items():
        for form in ("one", "many"):
            assert {getattr(c, field) for c in CASES if c.form == form} == set(values), (field, form)
    assert {c.pattern for c in CASES} == {"local", "interlaced", "grid", "rows", "columns", "dense"}
    assert any(
        not c.partition.divides and c.bias and c.form == form for c in CASES for form in ("one", "many", "split")
    )
    assert ceil(sum(c.size[0] != c.size[1] for c in CASES)) > len(CASES) // 2


# ------------------------------------------------------------------------------------------------------------ limits
SMALL = Case("interlaced", (3, 5), (2, 3), (1, 1), (24, 39), heads=2, bias=True, dtype=torch.float16)


@pytest.mark.parametrize("form", ["one", "many", "split"])
def test_two_runs_agree_to_the_bit(form: str) -> None:
    case = Case(**{**SMALL.__dict__, "form": form})
    inputs = arguments(case)
    first, second = run(case, inputs), run(case, inputs)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", ["one", "many"])
def test_a_constant_added_to_the_bias_is_added_to_lse_and_changes_nothing_else(form: str) -> None:
    """Far below and far above what exp holds, also in the rows of queries that a ragged group lacks."""
    tokens, constant = (3, 5) if form == "one" else (3, 6), torch.tensor([-300.0, 300.0])  # of two heads
    case = Case("interlaced", tokens, (1, 2), (0, 1), (24, 39), heads=2, bias=True, form=form)
    inputs = arguments(case)
    expected, got = run(case, inputs), run(case, inputs | {"bias": inputs["bias"] + constant[:, None, None]})
    got["lse"] -= constant
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(("pattern", "form"), [("local", "one"), ("interlaced", "many"), ("local", "split")])
def test_programs_in_any_order_give_the_same_bits(pattern: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "PARTIAL_SUMS", 4)  # of dbias: a program sums over several groups
    tokens = (3, 5) if form == "one" else (3, 6)  # more than a block
    case = replace(SMALL, pattern=pattern, tokens=tokens, groups=(1, 3), short=(0, 2), form=form)
    inputs = arguments(case)
    in_order = run(case, inputs)
    with guard.shuffled(seed=0):
        shuffled = run(case, inputs)
    assert all(torch.equal(in_order[name], shuffled[name]) for name in in_order)


@pytest.mark.parametrize("widths", [(256, 512), (64, 64), (39, 39)])
def test_traffic_of_a_group_that_fits_is_compulsory(widths: Pair) -> None:
    case = Case("interlaced", (8, 8), (2, 3), widths=widths, dtype=torch.float16)
    inputs, (tile, tiles) = arguments(case), case.tiles()
    q, k, v, do = (inputs[name] for name in ("q", "k", "v", "do"))
    with guard.watch() as memory:
        launch.forward(q, k, v, None, torch.empty_like(v), None, case.scale, case.partition, tile)
    assert memory.traffic() <= 1.02 * sum(t.nbytes for t in (q, k, v, v))
    with guard.watch() as memory:
        launch.backward(q, k, v, None, None, None, do, None, torch.empty_like(q), torch.empty_like(k),
                        torch.empty_like(v), None, None, case.scale, case.partition, tiles)  # fmt: skip
    assert len(memory.launches) == 1
    assert memory.traffic() <= 1.02 * sum(t.nbytes for t in (q, k, v, do, q, k, v))


def test_forward_without_lse_and_backward_without_dlse() -> None:
    for form in ("one", "many"):
        case = Case("local", (4, 4), (2, 1), form=form)
        inputs, partition, (tile, tiles) = arguments(case), case.partition, case.tiles()
        q, k, v, do = (inputs[name] for name in ("q", "k", "v", "do"))
        out, lse, delta = torch.empty_like(v), torch.empty(q.shape[:4]), torch.empty(q.shape[:4])
        launch.forward(q, k, v, None, out, None, case.scale, partition, tile)
        launch.forward(q, k, v, None, torch.empty_like(v), lse, case.scale, partition, tile)
        got = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        launch.backward(q, k, v, None, out, lse, do, None, *got, delta, None, case.scale, partition, tiles)
        exact = derivatives(inputs | {"dlse": torch.zeros(q.shape[:4])}, case, torch.float64)
        for name, result in zip(("out", "dq", "dk", "dv"), (out, *got), strict=True):
            torch.testing.assert_close(result.double(), exact[name], atol=1e-4, rtol=1e-4)


def test_empty_batch_launches_nothing() -> None:
    case = Case("local", (4, 4), (2, 1), maps=0, bias=True)
    inputs, (tile, tiles) = arguments(case), case.tiles()
    q, k, v, do, bias = (inputs[name] for name in ("q", "k", "v", "do", "bias"))
    partials = torch.empty(launch.bias_partials_shape(0, 1, case.partition, tiles))
    with guard.watch() as memory:
        launch.forward(q, k, v, bias, v.clone(), None, 1.0, case.partition, tile)
        launch.backward(q, k, v, bias, None, None, do, None, q.clone(), k.clone(), v.clone(), None, partials,
                        1.0, case.partition, tiles)  # fmt: skip
    assert not memory.launches
    assert torch.equal(partials.sum(0), torch.zeros(1, 16, 16))


@pytest.mark.parametrize("form", ["one", "split"])
@pytest.mark.parametrize("far", ["batch", "row", "column", "head", "channel"])
def test_offsets_beyond_31_bits(far: str, form: str) -> None:
    case = Case("local", (3, 4), (2, 2), (1, 1), (2, 2), heads=2, maps=2, form=form)
    shape = (case.maps, *case.size, case.heads, 2)
    dim = ["batch", "row", "column", "head", "channel"].index(far)
    strides = torch.empty(shape).stride()
    distant = tuple((3 << 30) // (shape[dim] - 1) if i == dim else 2 * s for i, s in enumerate(strides))

    def spread(tensor: Tensor) -> Tensor:
        memory = torch.empty((3 << 30) + 4096, dtype=torch.float16)  # virtual: only touched pages exist
        return memory.as_strided(shape, distant).copy_(tensor)

    inputs = {name: t.half() if name != "dlse" else t for name, t in arguments(case).items()}
    exact = derivatives(inputs, case, torch.float64)
    q, k, v, do = (spread(inputs[name]) for name in ("q", "k", "v", "do"))
    out, dq, dk, dv = (spread(torch.full(shape, float("nan"))) for _ in range(4))
    lse, delta = torch.empty(shape[:4]), torch.empty(shape[:4])
    tile, tiles = case.tiles()
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
        slots, heads, *pairs = launch.bias_partials_shape(64, 8, partition, tiles)
        programs = slots * heads * prod(ceil(n / 64) for n in pairs)
        assert slots == 1 or programs <= launch.PARTIAL_SUMS


# ------------------------------------------------------------------------------------------------- the guard itself
def test_bf16_rounds_to_nearest_even_as_torch_does() -> None:
    values = torch.randn(4096) * 1e3
    values[:3] = torch.tensor([float("inf"), float("nan"), 1.00390625])
    ours = torch.from_numpy(guard.bf16_to_fp32(guard.fp32_to_bf16(values.numpy())))
    torch.testing.assert_close(ours, values.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_guard_sees_planted_bugs() -> None:
    case = Case("local", (4, 4), (2, 1))
    q = torch.zeros(1, *case.size, 1, 32)
    tile = case.tiles()[0]
    beyond = Partition.local((9, 4), (3, 4))  # a map one row higher than the tensor
    with guard.watch(), pytest.raises(Exception, match="elements of no tensor"):
        launch.forward(q, q, q, None, q.clone(), None, 1.0, beyond, tile)
    with guard.watch(), pytest.raises(Exception, match="at once"):
        launch.forward(q, q, q, None, q[:, :, :, :, :1].clone().expand_as(q), None, 1.0, case.partition, tile)
    with guard.watch(), pytest.raises(Exception, match="another wrote"):
        launch.forward(q, q, q, None, q, None, 1.0, case.partition, Tile(16, 16, 32, 32)._replace(block_m=8))
    with guard.watch() as memory:
        launch.forward(q, q, q, None, torch.empty_like(q), None, 1.0, case.partition, tile)
    assert memory.unwritten(q) == q.numel()


def test_shuffled_programs_run_once_each_in_another_order() -> None:
    case = Case("local", (2, 2), (2, 1), maps=2)
    partition, tile, q = case.partition, case.tiles()[0], torch.randn(2, *case.size, 1, 32)
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
