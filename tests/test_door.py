"""What attention takes beside q, k and v, against the formula in fp64: alone and together, on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from isa_triton import Partition, dropout_mask, missing_tokens, partitioned_attention, partitioned_attention_with_lse
from tests.cases import PARTITIONS, relative_error
from tests.compiling import run_compiling

pytestmark = [pytest.mark.usefixtures("kernels"), pytest.mark.usefixtures("_quietly")]
HEADS = 6
CASES = {  # some of the partitions, of every number of axes
    name: PARTITIONS[name]
    for name in ("interlaced-ragged", "local-ragged", "shifted", "line", "volume-mixed", "cyclic-ragged")
}
FEATURES: dict[str, tuple[str, ...]] = {
    "bias": ("bias",),
    "bias of one head": ("one-bias",),
    "bias per map": ("map-bias",),
    "bias per map, of one head": ("one-map-bias",),
    "scales": ("scales",),
    "valid": ("valid",),
    "shared heads": ("shared",),
    "extra keys": ("extra",),
    "weighted keys": ("extra", "weight"),
    "weighted by pixel": ("extra", "pixel-weight"),
    "cosines": ("cosine",),
    "scaled cosines": ("cosine", "scales", "bias"),
    "all": ("map-bias", "scales", "valid", "shared", "extra", "pixel-weight", "cosine"),
    "all but extra": ("bias", "scales", "valid", "shared"),
    "all but extra, of cosines": ("bias", "scales", "valid", "shared", "cosine"),
}


@pytest.fixture
def _quietly() -> Iterator[None]:
    with np.errstate(all="ignore"):  # the interpreter is NumPy, which warns of the logarithm of 0
        yield


every_case = pytest.mark.parametrize("partition", CASES.values(), ids=CASES.keys())
every_feature = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())


def drawn(partition: Partition, features: tuple[str, ...], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Random arguments; of three maps, and with rows of the bias that forbid all keys."""
    maps, heads, tokens, size = 3, HEADS, partition.tokens, partition.size
    key_heads = 3 if "shared" in features else heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype)

    given: dict[str, Any] = {
        "q": normal(maps, *size, heads, 5),
        "k": normal(maps, *size, key_heads, 5),
        "v": normal(maps, *size, key_heads, 4),
    }
    of_map = (maps,) if {"map-bias", "one-map-bias"} & {*features} else ()
    if any(name.endswith("bias") for name in features):
        bias = normal(*of_map, 1 if any(name.startswith("one") for name in features) else heads, tokens, tokens)
        given["bias"] = bias.masked_fill(torch.rand(*bias.shape[:-1], 1) < 0.1, -torch.inf)
    if "scales" in features:
        given["scale"] = normal(heads)
    if "valid" in features:
        given["valid"] = torch.rand(maps, *size) < 0.6
        given["valid"][0] = False  # a map without a pixel
    if "extra" in features:
        given |= {"extra_k": normal(maps, 2, heads, 5), "extra_v": normal(maps, 2, heads, 4)}
    if "weight" in features:
        given["extra_weight"] = torch.tensor([3.0, 0.0])
    if "pixel-weight" in features:
        given["extra_weight"] = torch.randint(0, 3, (maps, *size, 2)).double()
    if "cosine" in features:
        given["cosine"] = True
    return given


def formula(partition: Partition, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Dense attention over all pixels and all extra keys, in fp64, with a loop over maps and heads; out and lse.

    `kept` [B, *size, heads, tokens + n] says by what the weights of a pixel are multiplied.
    """
    given = in_fp64(given)
    q, k, v, size = given["q"], given["k"], given["v"], partition.size
    group, token = torch.tensor([partition.seat(*pixel) for pixel in product(*map(range, size))]).T
    outs, lses = [], []
    for b, h in product(range(q.shape[0]), range(q.shape[-2])):
        key_head = h * k.shape[-2] // q.shape[-2]
        queries, keys, values = (x[b, ..., i, :].flatten(0, -2) for x, i in ((q, h), (k, key_head), (v, key_head)))
        valid = given["valid"][b].flatten() if "valid" in given else torch.ones(len(queries), dtype=torch.bool)
        scale = given["scale"][h] if "scale" in given else queries.shape[-1] ** -0.5
        queries, keys, values = (x.masked_fill(~valid[:, None], 0) for x in (queries, keys, values))
        more_keys = given["extra_k"][b, :, h] if "extra_k" in given else keys[:0]
        if given.get("cosine"):
            queries, keys, more_keys = (
                x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (queries, keys, more_keys)
            )
        scores = scale * queries @ keys.mT
        if (bias := given.get("bias")) is not None:
            table = bias[b] if bias.dim() == 4 else bias
            scores = scores + table[h if len(table) > 1 else 0][token[:, None], token]
        scores = scores.masked_fill((group[:, None] != group) | ~valid, -torch.inf)
        if "extra_k" in given:
            more = scale * queries @ more_keys.mT
            weight = given.get("extra_weight", torch.ones(more.shape[-1]))
            weight = weight if weight.dim() == 1 else weight[b].flatten(0, -2)
            scores = torch.cat([scores, more + weight.log()], -1)
            values = torch.cat([values, given["extra_v"][b, :, h]])
        scores = scores.masked_fill(~valid[:, None], -torch.inf)
        keyless = (scores == -torch.inf).all(-1, keepdim=True)
        p = scores.masked_fill(keyless, 0).softmax(-1).masked_fill(keyless, 0)
        if (kept := given.get("kept")) is not None:
            factors = kept[b, ..., h, :].flatten(0, -2)  # [pixels, tokens + n]
            p = p * torch.cat([factors[:, token], factors[:, partition.tokens :]], -1)
        outs.append(p @ values)
        lse = scores.masked_fill(keyless, 0).logsumexp(-1)
        lses.append(lse.masked_fill(keyless[:, 0], -torch.inf))
    shape = q.shape[0], q.shape[-2], *size
    return torch.stack(outs).view(*shape, -1).movedim(1, -2), torch.stack(lses).view(shape).movedim(1, -1)


def gradients(outputs: tuple[Tensor, Tensor], given: dict[str, Any], create_graph: bool = False) -> dict[str, Tensor]:
    """Of all arguments that have one, from random gradients that arrive; lse of no keys has none."""
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]
    upstream[1] = upstream[1].masked_fill(outputs[1].isinf(), 0)
    leaves = {name: x for name, x in given.items() if isinstance(x, Tensor) and x.requires_grad}
    found = torch.autograd.grad(outputs, list(leaves.values()), upstream, create_graph=create_graph)
    return dict(zip(leaves, found, strict=True))


def in_fp64(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if is_real(x) else x for name, x in given.items()}


def learned(given: dict[str, Any]) -> dict[str, Any]:
    return {
        name: x.detach().requires_grad_() if is_real(x) and name != "extra_weight" else x for name, x in given.items()
    }


def is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def compared(
    partition: Partition, given: dict[str, Any], tolerance: float, backend: str = "eager", **dropout: Any
) -> None:
    """Output, lse and all gradients are the formula's."""
    given, exact = learned(given), learned(in_fp64(given))
    options: dict[str, Any] = {name: x for name, x in given.items() if name not in ("q", "k", "v")} | dropout
    if dropout:
        (maps, *_, heads, _), n = given["q"].shape, given["extra_k"].shape[1] if "extra_k" in given else 0
        mask = dropout_mask(partition, maps=maps, heads=heads, **dropout, extra_keys=n)
        exact["kept"] = mask.double() / (1 - dropout["dropout_p"])
    got = partitioned_attention_with_lse(given["q"], given["k"], given["v"], partition, **options, backend=backend)
    expected = formula(partition, exact)
    infinite = expected[1].isinf()
    assert torch.equal(got[1].isinf(), infinite)
    assert relative_error(got[0], expected[0]) < tolerance
    assert relative_error(got[1].masked_fill(infinite, 0), expected[1].masked_fill(infinite, 0)) < tolerance
    found, wanted = gradients(got, given), gradients(expected, exact)
    assert {name: x.dtype for name, x in found.items()} == {name: given[name].dtype for name in found}
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    assert {name: error for name, error in errors.items() if not error < tolerance} == {}
    out = partitioned_attention(given["q"], given["k"], given["v"], partition, **options, backend=backend)
    assert relative_error(out, expected[0]) < tolerance


@every_case
@every_feature
def test_every_feature_is_the_formula(partition: Partition, features: tuple[str, ...]) -> None:
    compared(partition, drawn(partition, features), 1e-12)


OF_KERNELS = "local-ragged", "volume-mixed", "cyclic-ragged"  # all features on each, one alone on one of them in turn
ON = [(name, feature) for i, feature in enumerate(FEATURES) for j, name in enumerate(OF_KERNELS)
      if i % len(OF_KERNELS) == j or feature.startswith("all")]  # fmt: skip


@pytest.mark.parametrize(("name", "feature"), ON)
def test_kernels_are_the_formula_too(name: str, feature: str) -> None:
    compared(PARTITIONS[name], drawn(PARTITIONS[name], FEATURES[feature], torch.float32), 2e-5, backend="triton")


BF16 = torch.bfloat16


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_bias_of_another_dtype_is_read_as_it_is(backend: str) -> None:
    """An fp32 table under bf16: what is added to scores is not rounded, nor is its gradient's dtype changed."""
    partition = PARTITIONS["local-ragged"]
    q, k, v = torch.randn(3, 2, *partition.size, 3, 16).to(BF16)
    bias = (300 + torch.randn(3, partition.tokens, partition.tokens)).requires_grad_()  # bf16 has steps of 2 there
    exact = formula(partition, {"q": q, "k": k, "v": v, "bias": bias})[0]
    out = partitioned_attention(q, k, v, partition, bias=bias, backend=backend)
    assert relative_error(out.float(), exact.float()) < 0.02
    (gradient,) = torch.autograd.grad(out.sum(), bias)
    assert gradient.dtype == torch.float32
    with torch.autocast("cpu", dtype=BF16):
        again = partitioned_attention(q.float(), k.float(), v.float(), partition, bias=bias, backend=backend)
    assert torch.equal(again, out)


@pytest.mark.parametrize("more", [(), ("scales",), ("scales", "cosine")], ids="-".join)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_what_pixels_that_are_not_valid_hold_is_no_matter(backend: str, more: tuple[str, ...]) -> None:
    partition = PARTITIONS["shifted"]
    given = drawn(partition, ("valid", "shared", "extra", "bias", *more), torch.float32)
    options: dict[str, Any] = {name: x for name, x in given.items() if name not in ("q", "k", "v")}

    def results(value: float) -> list[Tensor]:
        leaves = [
            given[name].masked_fill(~given["valid"][..., None, None], value).requires_grad_()
            for name in ("q", "k", "v")
        ]
        others = {name: given[name].detach().requires_grad_() for name in ("extra_k", "scale") if name in given}
        options.update(others)
        q, k, v = leaves
        out = partitioned_attention(q, k, v, partition, **options, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), [*leaves, *others.values()])]

    for clean, dirty in zip(results(0.0), results(torch.nan), strict=True):
        assert torch.equal(clean, dirty)
    for x in results(torch.nan)[:4]:
        assert not x[~given["valid"]].any()


@pytest.mark.parametrize("size", [(7,), (5, 6), (3, 4, 5)], ids=str)
def test_weighted_keys_are_zero_padding_through_a_projection_with_a_bias(size: tuple[int, ...]) -> None:
    """As in window attention of padded maps (SAM's, Swin's): padded pixels are keys, all of them the same."""
    partition = Partition.local(size, window=(3,) * len(size))
    whole = tuple(-(-n // 3) * 3 for n in size)
    x = torch.randn(2, *size, 4, dtype=torch.float64)
    project = torch.nn.Linear(4, 3 * 6, dtype=torch.float64)
    padding = [n for a, b in zip(reversed(whole), reversed(size), strict=True) for n in (0, a - b)]
    padded = project(torch.nn.functional.pad(x, (0, 0, *padding))).unflatten(-1, (3, 2, 3)).unbind(-3)
    expected = partitioned_attention(*padded, Partition.local(whole, window=(3,) * len(size)))
    q, k, v = project(x).unflatten(-1, (3, 2, 3)).unbind(-3)
    _, key, value = project.bias.view(1, 1, 3, 2, 3).expand(2, -1, -1, -1, -1).unbind(2)
    weight = missing_tokens(partition)[None, ..., None].double()
    out = partitioned_attention(q, k, v, partition, extra_k=key, extra_v=value, extra_weight=weight)
    assert relative_error(out, expected[(slice(None), *map(slice, size))]) < 1e-14


def test_missing_tokens_are_counted_group_by_group() -> None:
    for partition in PARTITIONS.values():
        groups = [partition.seat(*pixel)[0] for pixel in product(*map(range, partition.size))]
        expected = [partition.tokens - groups.count(group) for group in groups]
        assert missing_tokens(partition).flatten().tolist() == expected


@pytest.mark.parametrize("name", [name for name in FEATURES if name.startswith("all")])
def test_every_derivative_is_that_of_the_formula(name: str) -> None:
    """Second ones, and forward mode; operators and graphs too."""
    partition = Partition.local((3, 4), window=(2, 3), shift=(1, 1))
    given = drawn(partition, FEATURES[name])
    given["bias"] = torch.randn_like(given["bias"])  # finite: all of these are smooth
    given["valid"][0] = True
    names = [name for name in given if is_real(given[name]) and name != "extra_weight"]
    leaves = [given[name].requires_grad_() for name in names]

    def f(*tensors: Tensor) -> Tensor:
        q, k, v = tensors[:3]
        options: Any = given | dict(zip(names, tensors, strict=True))
        options = {name: x for name, x in options.items() if name not in ("q", "k", "v")}
        out = partitioned_attention(q, k, v, partition, **options)
        return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()

    def exact(*tensors: Tensor) -> Tensor:
        out = formula(partition, given | dict(zip(names, tensors, strict=True)))[0]
        return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()

    tangents = tuple(torch.randn_like(x) for x in leaves)
    _, push = torch.func.jvp(f, tuple(leaves), tangents)
    _, wanted = torch.func.jvp(exact, tuple(leaves), tangents)
    assert relative_error(push, wanted) < 1e-12
    seconds = []
    for function in (f, exact):
        first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        along = sum((a * b).sum() for a, b in zip(first, tangents, strict=True))
        seconds.append(torch.autograd.grad(along, leaves))
    for a, b in zip(*seconds, strict=True):
        assert relative_error(a, b) < 1e-11
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*leaves), exact(*leaves)) < 1e-12


def test_vmap_folds_what_it_maps_into_heads() -> None:
    partition = PARTITIONS["local-ragged"]
    given = drawn(partition, ("map-bias", "scales", "shared", "valid"))
    q, k, v = (torch.randn(4, *given[name].shape, dtype=torch.float64) for name in ("q", "k", "v"))
    scale = torch.randn(4, HEADS, dtype=torch.float64)

    def one(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return partitioned_attention(q, k, v, partition, bias=given["bias"], scale=scale, valid=given["valid"])

    together = torch.func.vmap(one)(q, k, v, scale)
    alone = torch.stack([one(*each) for each in zip(q, k, v, scale, strict=True)])
    assert relative_error(together, alone) < 1e-13
    of_sums = torch.func.vmap(torch.func.grad(lambda *x: one(*x).square().sum(), argnums=(0, 1, 3)))(q, k, v, scale)
    leaves = [x.requires_grad_() for x in (q, k, scale)]
    each = torch.autograd.grad(sum(one(*x).square().sum() for x in zip(q, k, v, scale, strict=True)), leaves)
    for a, b in zip(of_sums, each, strict=True):
        assert relative_error(a, b) < 1e-12
    with pytest.raises(NotImplementedError, match="vmap has no `valid` of its own"):
        torch.func.vmap(lambda valid: partitioned_attention(q[0], k[0], v[0], partition, valid=valid))(
            given["valid"].expand(4, *given["valid"].shape)
        )


def test_gradients_of_a_bias_per_map_are_the_same_every_time() -> None:
    """They are summed in a fixed order, by the kernels too."""
    partition = Partition.rows((9, 8))  # nine groups of a map have one bias: pair attention
    given = drawn(partition, ("map-bias",), torch.float32)
    q, k, v, bias = (given[name].requires_grad_() for name in ("q", "k", "v", "bias"))

    def gradient() -> Tensor:
        out = partitioned_attention(q, k, v, partition, bias=bias, backend="triton")
        return torch.autograd.grad(out.square().sum(), bias)[0]

    assert torch.equal(gradient(), gradient())


@pytest.mark.parametrize("size", [(2,), (5, 7)], ids=str)
def test_no_map_has_no_bias(size: tuple[int, ...]) -> None:
    """An empty batch with a bias for each of its maps: gradients of that shape, and no program that writes beyond."""
    partition = Partition.local(size, window=(2,) * len(size))
    q, k, v = (torch.randn(0, *size, 3, 16, requires_grad=True) for _ in range(3))
    bias = torch.randn(0, 3, partition.tokens, partition.tokens, requires_grad=True)
    out = partitioned_attention(q, k, v, partition, bias=bias, backend="triton")
    gradients = torch.autograd.grad(out.sum(), (q, k, v, bias))
    assert [gradient.shape for gradient in gradients] == [x.shape for x in (q, k, v, bias)]


COMPILED = """
import torch
from triton.backends.compiler import GPUTarget

from isa_triton import Partition, tiles
from isa_triton.backend.kernels import launch, plan

maps, heads, shared, width = 2, 4, 2, 32


def layout(*shape, dtype=torch.bfloat16, stride=None):
    stride = torch.empty(shape, device="meta").stride() if stride is None else stride
    return plan.Layout(shape, stride, dtype, aligned=True)


for name, target in (("sm_90", GPUTarget("cuda", 90, 32)), ("gfx942", GPUTarget("hip", "gfx942", 64))):
    partition = Partition.local((4, 12, 24), (2, 4, 4), (1, 2, 3), cyclic=(False, False, True))
    tokens, here = partition.tokens, (maps, *partition.size)
    q, k = layout(*here, heads, width), layout(*here, shared, width)
    lse, scales = layout(*here, heads, dtype=torch.float32), layout(heads, dtype=torch.float32)
    bias = layout(maps, heads, tokens, tokens, dtype=torch.float32)
    valid = layout(*here, heads, dtype=torch.uint8, stride=(*torch.empty(here, device="meta").stride(), 0))
    seed = None
    found = tiles.backward(name, width, width, "bfloat16", tokens)
    tile = tiles.lookup(name, "forward", width, width, "bfloat16", tokens)
    sums = layout(*plan.bias_partials_shape(maps, heads, partition, found, per_map=True), dtype=torch.float32)
    given = q, k, k, bias, scales, valid, seed, None, q, lse
    launches = [*plan.forward(given, 1.0, partition, tile, "ieee")]
    launches += plan.backward((*given, q, lse, q, q, q, lse, sums), 1.0, partition, found, "ieee")
    for each in launches:
        print(name, each.kernel.__name__, len(launch.compile(each, target).asm) > 0)
"""


@pytest.mark.slow
def test_kernels_that_take_everything_compile() -> None:
    """What the interpreter lets pass a compiler may refuse: three axes, a seam, and all arguments at once."""
    done = run_compiling("-c", COMPILED)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {target for target, *_ in lines} == {"sm_90", "gfx942"}
    assert all(compiled == "True" for *_, compiled in lines)
