"""Dropout of attention weights: the same mask on every backend, in every derivative, and what the mask is like."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from isa_triton import (
    ISAModule,
    Partition,
    SelfAttention2d,
    dropout_mask,
    maps,
    partitioned_attention,
    partitioned_attention_with_lse,
)
from isa_triton.backend import triton
from isa_triton.inference import fuse
from isa_triton.sharding import parallel
from tests import test_door
from tests.cases import PARTITIONS, relative_error
from tests.compiling import run_compiling
from tests.kernel_cases import FORMS, tiles_of
from tests.test_door import compared, drawn, learned

pytestmark = pytest.mark.usefixtures("kernels")
_quietly = test_door._quietly
P, SEED = 0.3, -(2**40) - 12345  # a seed of more than 32 bits
DROPOUT: dict[str, Any] = {"dropout_p": P, "seed": SEED}
CASES = {name: PARTITIONS[name] for name in ("interlaced-ragged", "shifted-ragged", "line", "volume-mixed", "cyclic")}
FEATURES: dict[str, tuple[str, ...]] = {
    "alone": (),
    "bias": ("bias",),
    "extra keys": ("extra", "weight"),
    "all": ("map-bias", "scales", "valid", "shared", "extra", "pixel-weight"),
    "all but extra": ("bias", "scales", "valid", "shared"),
}
every_feature = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())


# -- the formula with the mask -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_quietly")
@pytest.mark.parametrize("partition", CASES.values(), ids=CASES.keys())
@every_feature
def test_attention_is_the_formula_with_the_mask(partition: Partition, features: tuple[str, ...]) -> None:
    compared(partition, drawn(partition, features), 1e-12, **DROPOUT)


@pytest.mark.usefixtures("_quietly")
@pytest.mark.parametrize(("name", "features"), [("line", "all but extra"), ("volume-mixed", "bias"), ("cyclic", "all")])
def test_kernels_are_the_formula_with_the_mask_too(name: str, features: str) -> None:
    compared(PARTITIONS[name], drawn(PARTITIONS[name], FEATURES[features], torch.float32), 2e-5, "triton", **DROPOUT)


@pytest.mark.usefixtures("_quietly")
@pytest.mark.parametrize("form", FORMS)
def test_every_kernel_drops_what_the_mask_says(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, block by block, with whole rows and columns of scores, and dq, dk and dv at once."""
    partition = Partition.local((4, 8), window=(3, 6), shift=(1, 0))
    tile, backward = tiles_of(form, partition.tokens)
    monkeypatch.setattr(triton, "_forward_tile", lambda *problem: tile)
    monkeypatch.setattr(triton, "_backward_tiles", lambda *problem: backward)
    monkeypatch.setattr(triton, "keeps_output", lambda *problem: backward.group is None)
    given = drawn(partition, ("bias", "valid", "shared"), torch.float32)
    given = {name: x[1:] if name in ("q", "k", "v", "valid") else x for name, x in given.items()}
    compared(partition, given, 2e-5, "triton", **DROPOUT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_halves_drop_the_same_weights(dtype: torch.dtype, backend: str) -> None:
    partition = PARTITIONS["local-ragged"]
    given = drawn(partition, (), torch.float32)
    q, k, v = (given[name].to(dtype) for name in ("q", "k", "v"))
    exact = partitioned_attention(q.double(), k.double(), v.double(), partition, **DROPOUT)
    assert relative_error(partitioned_attention(q, k, v, partition, **DROPOUT, backend=backend), exact) < 0.02


# -- the mask ----------------------------------------------------------------------------------------------------------


def numbers_of(seed: int, map_: int, head: int, query: int, key: int) -> int:
    """The hash once more, in Python's integers."""
    low = (1 << 32) - 1

    def mix(x: int) -> int:
        x = ((x ^ x >> 16) * 0x21F0AAAD) & low
        x = ((x ^ x >> 15) * 0x735A2D97) & low
        return x ^ x >> 15

    state = 0
    for number in (seed & low, seed >> 32 & low, map_, head):
        state = mix(((state ^ number) + 0x9E3779B9) & low)
    start, other = (mix(((x ^ query) + 0x9E3779B9) & low) for x in (state, mix(((state ^ low) + 0x9E3779B9) & low)))
    return mix((start + (other | 1) * key) & low)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -(2**63) + 1, SEED])
def test_the_mask_is_a_hash_of_where_a_weight_stands(seed: int) -> None:
    """Whatever the partition: a pixel is known by its number in the map, and extra keys have those behind."""
    partition = PARTITIONS["cyclic-ragged"]
    mask = dropout_mask(partition, maps=2, heads=3, dropout_p=P, seed=seed, extra_keys=2)
    _, height, width = partition.size
    expected = torch.zeros_like(mask)
    for b, h, *pixel in product(range(2), range(3), *map(range, partition.size)):
        query, (group, _) = (pixel[0] * height + pixel[1]) * width + pixel[2], partition.seat(*pixel)
        seats = (partition.coordinates(group, token) for token in range(partition.tokens))
        keys = [(z * height + y) * width + x if inside else None for z, y, x, inside in seats]
        keys += [partition.pixels, partition.pixels + 1]
        drawn = [key is not None and numbers_of(seed, b, h, query, key) >= int(P * 2**32) for key in keys]
        expected[(b, *pixel, h)] = torch.tensor(drawn)
    assert torch.equal(mask, expected)


def test_masks_of_two_partitions_are_the_same_where_both_have_a_pair() -> None:
    window, whole = Partition.local((6, 8), window=(3, 4), shift=(1, 2)), Partition.dense((6, 8))
    of_window, of_whole = (dropout_mask(x, maps=1, heads=2, **DROPOUT) for x in (window, whole))
    for y, x in product(range(6), range(8)):
        group, _ = window.seat(y, x)
        for token in range(window.tokens):
            row, column, inside = window.coordinates(group, token)
            wanted = of_whole[0, y, x, :, row * 8 + column] if inside else torch.tensor(False)
            assert bool((of_window[0, y, x, :, token] == wanted).all())


def correlated(a: Tensor, b: Tensor, p: float) -> float:
    """Of two masks, in standard deviations of independent ones."""
    a, b = a.double() - (1 - p), b.double() - (1 - p)
    return float((a * b).sum() / (p * (1 - p) * math.sqrt(a.numel())))


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_masks_are_as_if_drawn_independently(p: float) -> None:
    """The share within 4 standard deviations, and no correlation of rows, columns, heads, maps or seeds."""
    size, maps, heads = (12, 16), 4, 4
    masks = [
        dropout_mask(Partition.dense(size), maps=maps, heads=heads, dropout_p=p, seed=seed).flatten(1, 2)
        for seed in (0, 1, 2, 2**32, 3 * 2**32)
    ]  # [maps, pixels, heads, pixels] each
    for mask in masks:
        assert abs(float(mask.double().sum()) - (1 - p) * mask.numel()) < 4 * math.sqrt(p * (1 - p) * mask.numel())
        for dim in range(4):
            for step in (1, 2, 3):
                a, b = mask.narrow(dim, 0, mask.shape[dim] - step), mask.narrow(dim, step, mask.shape[dim] - step)
                assert abs(correlated(a, b, p)) < 4.5, (dim, step)
        shifted = mask[:, 1:, :, 1:], mask[:, :-1, :, :-1]
        assert abs(correlated(*shifted, p)) < 4.5
        symmetric = mask, mask.transpose(1, 3)
        off = ~torch.eye(mask.shape[1], dtype=torch.bool)[:, None]
        assert abs(correlated(*(x.masked_select(off) for x in symmetric), p)) < 4.5 * math.sqrt(2)  # each pair twice
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(correlated(a, b, p)) < 4.5
    counts = masks[0].double().sum(-1).flatten()  # of rows: as wide as a binomial's
    assert abs(float(counts.var()) / (p * (1 - p) * masks[0].shape[-1]) - 1) < 4 * math.sqrt(2 / counts.numel())


def test_the_first_bits_of_a_draw_are_uniform() -> None:
    """Chi-squared of 256 bins, for queries and for keys that follow each other."""
    from isa_triton.dropout import draw, rows_of

    start, step = rows_of(torch.tensor([7]), maps=1, heads=1, pixels=1024)  # [1, 1024, 1]
    bits = draw(start, step, torch.arange(1024)) >> 24
    for some in (bits, bits[:, :64], bits[..., :64]):
        counts = torch.bincount(some.flatten(), minlength=256).double()
        expected = some.numel() / 256
        assert abs(float(((counts - expected) ** 2 / expected).sum()) - 255) < 4 * math.sqrt(2 * 255)


# -- who computes it again ---------------------------------------------------------------------------------------------


def leaves_of(partition: Partition, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    given = learned(drawn(partition, (), dtype))
    return [given["q"], given["k"], given["v"]]


def attend(partition: Partition, **options: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: partitioned_attention(q, k, v, partition, **(DROPOUT | options))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_seeds_come_from_the_generator(backend: str) -> None:
    partition = PARTITIONS["local-ragged"]
    q, k, v = (x.detach() for x in leaves_of(partition, torch.float32))

    def call(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return partitioned_attention(q, k, v, partition, dropout_p=P, backend=backend)

    assert torch.equal(call(3), call(3))
    assert not torch.equal(call(3), call(4))
    assert not torch.equal(call(3), partitioned_attention(q, k, v, partition, dropout_p=P, backend=backend))
    torch.manual_seed(3)
    drawn_seed = torch.randint(2**63 - 1, (1,))[0]
    assert torch.equal(
        call(3), partitioned_attention(q, k, v, partition, dropout_p=P, seed=drawn_seed, backend=backend)
    )


def test_an_expectation_is_what_attention_is_without() -> None:
    partition = PARTITIONS["local"]
    q, k, v = (x.detach() for x in leaves_of(partition))
    outs = torch.stack([attend(partition, seed=seed)(q, k, v) for seed in range(100)])
    exact = partitioned_attention(q, k, v, partition)
    deviations = (outs.mean(0) - exact) / (outs.std(0) / math.sqrt(len(outs)))
    assert float(deviations.abs().max()) < 5.5  # the largest of thousands


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_lse_is_that_without_dropout(backend: str) -> None:
    partition = PARTITIONS["interlaced"]
    q, k, v = (x.detach() for x in leaves_of(partition, torch.float32))
    out, lse = partitioned_attention_with_lse(q, k, v, partition, **DROPOUT, backend=backend)
    assert torch.equal(lse, partitioned_attention_with_lse(q, k, v, partition, backend=backend)[1])
    assert torch.equal(out, attend(partition, backend=backend)(q, k, v))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_drops_the_same(reentrant: bool) -> None:
    """Where the seed is drawn again, from a generator that is put back."""
    partition = PARTITIONS["shifted"]
    leaves = leaves_of(partition)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return partitioned_attention(q, k, v, partition, dropout_p=P).square().sum()

    def gradients(call: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        for x in leaves:
            x.grad = None
        call(*leaves).backward()
        return tuple(x.grad for x in leaves if x.grad is not None)

    for a, b in zip(gradients(f), gradients(lambda *x: checkpoint(f, *x, use_reentrant=reentrant)), strict=True):
        assert torch.equal(a, b)


def test_derivatives_of_every_order() -> None:
    partition = Partition.local((2, 3), window=(2, 2), shift=(1, 1))
    leaves = [torch.randn(1, 2, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    bias = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)

    def f(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return partitioned_attention_with_lse(q, k, v, partition, bias=bias, **DROPOUT)

    assert torch.autograd.gradcheck(f, (*leaves, bias), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (*leaves, bias))


def test_compiled_and_exported_programs_drop_the_same() -> None:
    partition = PARTITIONS["cyclic"]
    leaves = leaves_of(partition)

    class Net(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, seed: Tensor) -> Tensor:
            return partitioned_attention(q, k, v, partition, dropout_p=P, seed=seed)

    given = (*leaves, torch.tensor(SEED))
    expected = attend(partition)(*leaves)
    gradients = torch.autograd.grad(expected.square().sum(), leaves)
    compiled = torch.compile(Net(), fullgraph=True, backend="aot_eager")
    program = torch.export.export(Net(), given)
    for net in (compiled, program.module()):
        for seed in (SEED, 11):  # the seed is an argument of the graph
            out = net(*leaves, torch.tensor(seed))
            assert torch.equal(out, attend(partition, seed=seed)(*leaves))
        found = torch.autograd.grad(net(*given).square().sum(), leaves)
        assert all(relative_error(a, b) < 1e-14 for a, b in zip(found, gradients, strict=True))
    decomposed = program.run_decompositions()
    assert torch.equal(decomposed.module()(*given), expected)


def test_compiled_programs_draw_seeds() -> None:
    partition = PARTITIONS["local"]
    q, k, v = (x.detach() for x in leaves_of(partition))
    compiled = torch.compile(
        lambda q, k, v: partitioned_attention(q, k, v, partition, dropout_p=P), fullgraph=True, backend="aot_eager"
    )
    assert not torch.equal(compiled(q, k, v), compiled(q, k, v))


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_vmap_is_one_call_after_another(backend: str) -> None:
    """With one seed for all calls and with one for each, also nested; the heads of a call are counted from 0."""
    eager = backend == "eager"
    partition, dtype = (PARTITIONS["local-ragged"], torch.float64) if eager else (Partition.rows((3, 4)), torch.float32)
    q, k, v = torch.randn(3, 3, 2, *partition.size, 2, 4, dtype=dtype)

    def call(q: Tensor, k: Tensor, v: Tensor, seed: Any) -> Tensor:
        return partitioned_attention(q, k, v, partition, dropout_p=P, seed=seed, backend=backend)

    seeds = torch.tensor([3, -4, 2**50])
    same = torch.func.vmap(call, in_dims=(0, 0, 0, None))(q, k, v, seeds[1])
    each = torch.func.vmap(call)(q, k, v, seeds)
    tolerance = 1e-13 if backend == "eager" else 1e-5
    assert relative_error(same, torch.stack([call(*x, seeds[1]) for x in zip(q, k, v, strict=True)])) < tolerance
    expected = torch.stack([call(*x) for x in zip(q, k, v, seeds, strict=True)])
    assert relative_error(each, expected) < tolerance
    nested = torch.func.vmap(torch.func.vmap(call, in_dims=(None, None, None, 0)), in_dims=(0, 0, 0, None))
    both = torch.stack([torch.stack([call(*x, seed) for seed in seeds]) for x in zip(q, k, v, strict=True)])
    assert relative_error(nested(q, k, v, seeds), both) < tolerance
    gradient = torch.func.grad(lambda *x: call(*x).square().sum())
    of_all = torch.func.vmap(gradient)(q, k, v, seeds)
    one_by_one = torch.stack([gradient(*x) for x in zip(q, k, v, seeds, strict=True)])
    assert relative_error(of_all, one_by_one) < 10 * tolerance


# -- layers ------------------------------------------------------------------------------------------------------------


def test_layers_drop_weights_in_training_alone() -> None:
    x = torch.randn(2, 8, 9, 12)
    layer = SelfAttention2d(8, 4, 8, pattern="local", partition_size=4, num_heads=2, attention_dropout=0.5)
    without = SelfAttention2d(8, 4, 8, pattern="local", partition_size=4, num_heads=2)
    without.load_state_dict(layer.state_dict())
    assert "attention_dropout=0.5" in repr(layer)
    with patch.object(maps, "partitioned_attention", wraps=partitioned_attention) as attend:
        torch.manual_seed(3)
        first = layer(x)
        assert attend.call_args.kwargs["dropout_p"] == 0.5
        assert not torch.equal(layer(x), first)
        torch.manual_seed(3)
        assert torch.equal(layer(x), first)
    without.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x), without.eval()(x))
    assert torch.equal(fuse(layer)(x), fuse(without)(x))
    block = ISAModule(8, 4, 8, 8, partition_size=4, dropout=0.0, attention_dropout=0.5)
    assert {stage.attention_dropout for stage in block.modules() if isinstance(stage, SelfAttention2d)} == {0.5}
    for wrong, kind in ((1, ValueError), (-0.1, ValueError), ("a", TypeError)):
        with pytest.raises(kind, match="attention_dropout must be a number from 0 to less than 1"):
            SelfAttention2d(8, 4, 8, pattern="local", attention_dropout=wrong)


def test_sharded_layers_refuse_it() -> None:
    with pytest.raises(
        ValueError, match=r"branches\.0\.long_range\.attention_dropout must be 0 to be sharded, got 0\.5"
    ):
        parallel._check(ISAModule(8, 4, 8, 8, attention_dropout=0.5))
    parallel._check(ISAModule(8, 4, 8, 8))


# -- the door ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and less than 1, got 1.0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p must be at least 0"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p must be at least 0"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a number, got '0.1'"),
        ({"dropout_p": True}, TypeError, "dropout_p must be a number, got True"),
        ({"dropout_p": torch.tensor([0.1, 0.2])}, TypeError, "dropout_p must be a number"),
        ({"seed": 3}, ValueError, "seed is that of dropout"),
        ({"dropout_p": 0.1, "seed": 2**63}, ValueError, "seed must have 64 bits"),
        ({"dropout_p": 0.1, "seed": 0.5}, TypeError, "seed must be an integer"),
        ({"dropout_p": 0.1, "seed": torch.tensor(3, dtype=torch.int32)}, TypeError, "seed must be a torch.int64"),
        ({"dropout_p": 0.1, "seed": torch.tensor([3, 4])}, TypeError, r"no dimensions, got torch.int64 of \(2,\)"),
        ({"dropout_p": 0.1, "seed": torch.tensor(3, device="meta")}, ValueError, "seed must be on the device of q"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    q = torch.zeros(1, 4, 6, 1, 2)
    with pytest.raises(kind, match=message):
        partitioned_attention(q, q, q, Partition.rows((4, 6)), **options)


def test_no_dropout_is_what_it_was() -> None:
    q = torch.randn(1, 4, 6, 2, 3)
    rows = Partition.rows((4, 6))
    assert torch.equal(partitioned_attention(q, q, q, rows, dropout_p=0), partitioned_attention(q, q, q, rows))
    assert bool(dropout_mask(rows, maps=1, heads=2, dropout_p=0, seed=1).all())


def test_almost_everything_and_almost_nothing_is_dropped() -> None:
    partition, most = Partition.dense((16, 16)), 1 - 2**-40
    assert dropout_mask(partition, maps=1, heads=1, dropout_p=2**-40, seed=1).all()
    assert not dropout_mask(partition, maps=1, heads=1, dropout_p=most, seed=1).any()
    q = torch.randn(1, 16, 16, 1, 16)
    for backend in ("eager", "triton"):
        assert not partitioned_attention(q, q, q, partition, dropout_p=most, seed=1, backend=backend).any()


def test_uncommon_numbers_of_maps_heads_and_keys() -> None:
    rows = Partition.rows((4, 6))
    for q, k in ((torch.zeros(0, 4, 6, 2, 3),) * 2, (torch.zeros(1, 4, 6, 0, 3),) * 2):
        for backend in ("eager", "triton"):
            assert partitioned_attention(q, k, k, rows, **DROPOUT, backend=backend).shape == q.shape
    assert dropout_mask(rows, maps=0, heads=2, **DROPOUT).shape == (0, 4, 6, 2, 6)


@pytest.mark.slow
def test_kernels_with_dropout_compile() -> None:
    """Of two calls of vmap; the mixer's second multiplier is in the code of every kernel."""
    program = test_door.COMPILED.replace("seed = None", "seed = layout(2, dtype=torch.int64)")
    program = program.replace(', "ieee")', ', "ieee", 0.5)')
    program = program.replace(
        "len(launch.compile(each, target).asm) > 0", f"'{0x735A2D97}' in launch.compile(each, target).asm['llir']"
    )
    done = run_compiling("-c", program)
    assert done.returncode == 0, done.stderr
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"sm_90", "gfx942"}
    assert all(line.endswith("True") for line in done.stdout.splitlines())
