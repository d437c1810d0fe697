"""The compared modules equal naive formulas, pixel by pixel; so do the forms that use our attention."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from bench.compared import modules
from isa_triton import Partition
from tests.cases import assert_same, outputs_and_gradients, qkv, relative_error

SIZE = H, W = 5, 7
PIXELS = list(product(range(H), range(W)))
Pixel = tuple[int, int]
Naive = Callable[[Any, Tensor], Tensor]


# -- the formulas, read off the papers: a map is [B, C, H, W], a pixel's vector [B, C] ---------------------------------


def each_pixel(f: Callable[[Pixel], Tensor], size: Pixel = SIZE) -> Tensor:
    """The map whose vector at every pixel is f(pixel) [B, C]."""
    vectors = [f(pixel) for pixel in product(*map(range, size))]
    return torch.stack(vectors, -1).unflatten(-1, size)


def at(x: Tensor, pixel: Pixel) -> Tensor:
    return x[:, :, pixel[0], pixel[1]]


def convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution of stride 1 that keeps the size, tap by tap."""
    (height, width), size = x.shape[2:], conv.kernel_size[0]
    reach, step = size // 2, conv.dilation[0]

    def output(pixel: Pixel) -> Tensor:
        total = torch.zeros(len(x), conv.out_channels, dtype=x.dtype)
        for i, j in product(range(size), repeat=2):
            y, column = pixel[0] + (i - reach) * step, pixel[1] + (j - reach) * step
            if 0 <= y < height and 0 <= column < width:
                total = total + at(x, (y, column)) @ conv.weight[:, :, i, j].T
        return total if conv.bias is None else total + conv.bias

    return each_pixel(output, (height, width))


def normalised(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch normalisation in training: the statistics of this very batch."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
    weight, bias = (p[None, :, None, None] for p in (norm.weight, norm.bias))
    return (x - mean) / (variance + norm.eps).sqrt() * weight + bias


def conv_norm_relu(layer: Any, x: Tensor) -> Tensor:
    return normalised(layer.norm, convolved(layer.conv, x)).clamp(min=0)


def twice(layers: Any, x: Tensor) -> Tensor:
    return conv_norm_relu(layers[1], conv_norm_relu(layers[0], x))


def attended(q: Tensor, k: Tensor, v: Tensor, keys: Callable[[Pixel], list[Pixel]], scale: float) -> Tensor:
    """Every pixel's mean of v over its keys, weighted by exp(scale q k)."""

    def context(pixel: Pixel) -> Tensor:
        weights = [torch.exp(scale * (at(q, pixel) * at(k, key)).sum(1, keepdim=True)) for key in keys(pixel)]
        values = [weight * at(v, key) for weight, key in zip(weights, keys(pixel), strict=True)]
        return torch.stack(values).sum(0) / torch.stack(weights).sum(0)

    return each_pixel(context)


def everywhere(pixel: Pixel) -> list[Pixel]:
    return PIXELS


def criss_cross(pixel: Pixel) -> list[Pixel]:
    return [key for key in PIXELS if key[0] == pixel[0] or key[1] == pixel[1]]  # itself once, though on both


def nonlocal_(m: Any, x: Tensor) -> Tensor:
    q, k, v = (convolved(conv, x) for conv in (m.theta, m.phi, m.g))
    context = attended(q, k, v, everywhere, (x.shape[1] / 2) ** -0.5)
    return x + normalised(m.norm, convolved(m.output, context))


def sa(m: Any, x: Tensor) -> Tensor:
    q, k, v = twice(m.query, x), twice(m.key, x), convolved(m.value, x)
    context = convolved(m.output, attended(q, k, v, everywhere, q.shape[1] ** -0.5))
    return conv_norm_relu(m.fuse, torch.cat([context, x], 1))


def rcca(m: Any, x: Tensor) -> Tensor:
    for _ in range(2):
        q, k, v = (convolved(conv, x) for conv in (m.query, m.key, m.value))
        x = m.gamma * attended(q, k, v, criss_cross, 1.0) + x
    return x


def rcca_head(m: Any, x: Tensor) -> Tensor:
    context = conv_norm_relu(m.output, rcca(m.attention, conv_norm_relu(m.reduce, x)))
    return conv_norm_relu(m.fuse, torch.cat([x, context], 1))


def generalized(m: Any, x: Tensor, kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """CGNL: in every group all entries attend all entries, whatever their channel; kernel(t_i p_j) is the affinity."""
    t, p, g = (convolved(conv, x).unflatten(1, (m.groups, -1)) for conv in (m.theta, m.phi, m.g))
    groups = []
    for i in range(m.groups):
        affinity = kernel(t[:, i].flatten(1)[:, :, None] * p[:, i].flatten(1)[:, None, :])  # [B, n, n]
        context = (affinity @ g[:, i].flatten(1)[:, :, None]).view_as(t[:, i])
        back = torch.einsum("oc,bchw->bohw", m.output.weight.flatten(1).chunk(m.groups)[i], context)
        groups.append((back - back.mean((1, 2, 3), True)) / (back.var((1, 2, 3), False, keepdim=True) + 1e-5).sqrt())
    weight, bias = (parameter[None, :, None, None] for parameter in (m.norm.weight, m.norm.bias))
    return x + torch.cat(groups, 1) * weight + bias


def gaussian(product: Tensor, gamma: float = 1e-4) -> Tensor:
    """exp(-gamma |t - p|^2) for unit t and p, its Taylor series cut after the third order."""
    terms = [(2 * gamma * product) ** i / math.factorial(i) for i in range(4)]
    return math.exp(-2 * gamma) * torch.stack(terms).sum(0)


def pooled(m: Any, x: Tensor) -> Tensor:
    """Means over cells that share their ragged edges, conv1x1 + BN + ReLU, bilinear interpolation between centres."""
    n = m.size

    def cell(pixel: Pixel) -> Tensor:
        (top, left), (bottom, right) = (
            (pixel[0] * H // n, pixel[1] * W // n),
            (-(-(pixel[0] + 1) * H // n), -(-(pixel[1] + 1) * W // n)),
        )
        return x[:, :, top:bottom, left:right].mean((2, 3))

    cells = conv_norm_relu(m, each_pixel(cell, (n, n)))

    def blend(pixel: Pixel) -> Tensor:
        place = [max((i + 0.5) * n / size - 0.5, 0) for i, size in zip(pixel, SIZE, strict=True)]
        low = [min(int(p), n - 1) for p in place]
        total = torch.zeros_like(at(cells, (0, 0)))
        for up, right in product((0, 1), repeat=2):
            corner = min(low[0] + up, n - 1), min(low[1] + right, n - 1)
            share = [1 - (p - i) if not far else p - i for p, i, far in zip(place, low, (up, right), strict=True)]
            total = total + share[0] * share[1] * at(cells, corner)
        return total

    return each_pixel(blend)


def ppm(m: Any, x: Tensor) -> Tensor:
    return conv_norm_relu(m.fuse, torch.cat([x, *(pooled(branch, x) for branch in m.branches)], 1))


def aspp(m: Any, x: Tensor) -> Tensor:
    *convolutions, mean = m.branches
    return conv_norm_relu(m.fuse, torch.cat([*(conv_norm_relu(c, x) for c in convolutions), pooled(mean, x)], 1))


MODULES: dict[str, tuple[Callable[[], nn.Module], Naive]] = {
    "NonLocal": (lambda: reference.NonLocal(6), nonlocal_),
    "SA": (lambda: reference.SA(6, 4, 3, 5, dropout=0.0), sa),
    "RCCA": (lambda: reference.RCCA(6, key_channels=2), rcca),
    "RCCAHead": (lambda: reference.RCCAHead(9, 8, dropout=0.0), rcca_head),
    "CGNL": (lambda: reference.CGNL(12, groups=3), lambda m, x: generalized(m, x, lambda product: product)),
    "CGNLx": (lambda: reference.CGNLx(12, groups=3), lambda m, x: generalized(m, x, gaussian)),
    "PPM": (lambda: reference.PPM(6, 5, sizes=(1, 2, 3), dropout=0.0), ppm),
    "ASPP": (lambda: reference.ASPP(4, 5, dilations=(1, 2, 3), dropout=0.0), aspp),
}


def with_random_parameters(module: nn.Module) -> nn.Module:
    """In fp64, with no parameter left where it makes the block an identity."""
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_its_papers_formula(name: str) -> None:
    make, naive = MODULES[name]
    module = with_random_parameters(make())
    channels = next(m for m in module.modules() if isinstance(m, nn.Conv2d)).in_channels
    x = torch.randn(2, channels, *SIZE, dtype=torch.float64)
    assert_same(outputs_and_gradients(module, x), outputs_and_gradients(module, x, call=naive), tolerance=1e-11)


@pytest.mark.parametrize("block", [reference.NonLocal, reference.RCCA, reference.CGNL, reference.CGNLx])
def test_blocks_start_as_the_identity(block: type[nn.Module]) -> None:
    x = torch.randn(2, 16, *SIZE)
    assert torch.equal(block(16)(x), x)


def test_widths_are_the_published_ones() -> None:
    rcca = reference.RCCA(512)
    assert rcca.query.weight.shape == rcca.key.weight.shape == (64, 512, 1, 1)
    assert reference.NonLocal(512).theta.weight.shape == (256, 512, 1, 1)
    assert reference.CGNL(512).output.weight.shape == (512, 32, 1, 1)
    assert reference.PPM(64, 16).fuse.conv.weight.shape == (16, 128, 3, 3)
    branches: Any = reference.ASPP(8, 4).branches
    assert [branch.conv.dilation for branch in branches] == [(1, 1), (12, 12), (24, 24), (36, 36), (1, 1)]


def test_two_rounds_of_criss_cross_reach_every_pixel_and_one_does_not() -> None:
    for recurrence in (1, 2):
        module = with_random_parameters(reference.RCCA(4, key_channels=2, recurrence=recurrence))
        x = torch.randn(1, 4, *SIZE, dtype=torch.float64)
        changed = x.clone()
        changed[:, :, 1, 2] += 1
        moved = (module(x) != module(changed)).any(1)[0]
        assert moved.all() == (recurrence == 2)


@pytest.mark.parametrize("name", ["cgnl", "context", "criss_cross", "nonlocal_"])
def test_examples_in_docstrings_are_right(name: str) -> None:
    module = __import__(f"reference.{name}", fromlist=[name])
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0


# -- the same functions by our attention -------------------------------------------------------------------------------


def without_dropout(head: Any) -> nn.Module:
    head.dropout.p = 0.0
    return head


@pytest.mark.parametrize(
    ("by_our_attention", "plain"),
    [
        (lambda: modules.PartitionedNonLocal(6), lambda: reference.NonLocal(6)),
        (lambda: modules.PartitionedRCCA(16), lambda: reference.RCCA(16)),
        (lambda: modules.SdpaSA(16, 4, 6, 8, dropout=0.0), lambda: reference.SA(16, 4, 6, 8, dropout=0.0)),
        (
            lambda: without_dropout(modules.PartitionedRCCAHead(16, 8)),
            lambda: without_dropout(reference.RCCAHead(16, 8)),
        ),
    ],
)
@pytest.mark.parametrize("size", [(5, 7), (1, 7), (4, 1), (1, 1)], ids=str)
def test_blocks_by_our_attention_equal_theirs(
    by_our_attention: Callable[[], nn.Module], plain: Callable[[], nn.Module], size: tuple[int, int]
) -> None:
    ours, theirs = with_random_parameters(by_our_attention()), plain().double()
    theirs.load_state_dict(ours.state_dict())
    channels = 6 if isinstance(ours, reference.NonLocal) else 16
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    assert_same(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x), tolerance=1e-11)


@pytest.mark.parametrize("logits", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("own", [False, True])
def test_merging_rows_and_columns_is_safe_for_any_scores(logits: float, own: bool) -> None:
    """Where a pixel attends itself alone its term is all of both sums, and is taken away from one of them."""
    q, k, v = qkv(Partition.dense(SIZE))
    k = logits * (q if own else k)
    exact = reference.criss_cross_attention(q, k, v)
    assert relative_error(modules.criss_cross_attention(q, k, v), exact) < 1e-12 * max(1, logits)
    single = [x.float() for x in (q, k, v)]
    plain, ours = (f(*single).double() for f in (reference.criss_cross_attention, modules.criss_cross_attention))
    assert relative_error(ours, exact) <= 2 * relative_error(plain, exact) + 8e-7 * max(1.0, logits)


def test_the_kernels_serve_the_compared_modules_too() -> None:
    q, k, v = (x.float() for x in qkv(Partition.dense((3, 5)), batch=1, heads=1))
    criss_cross, dense = (
        f(q, k, v, backend="triton") for f in (modules.criss_cross_attention, modules.dense_partition_attention)
    )
    assert relative_error(criss_cross, reference.criss_cross_attention(q, k, v)) < 1e-5
    assert relative_error(dense, reference.dense_attention(q, k, v)) < 1e-5


@pytest.mark.parametrize("block", [modules.SingleMapPPM, modules.SingleMapASPP])
def test_pooled_branches_train_on_one_map_by_their_running_statistics(block: type[nn.Module]) -> None:
    module = block(8, 4).train()
    module(torch.randn(1, 8, *SIZE)).sum().backward()
    frozen = {m for pooled in module.modules() if isinstance(pooled, reference.Pooled) for m in pooled.modules()}
    assert all(m.training == (m not in frozen) for m in module.modules())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block.__mro__[2](8, 4).train()(torch.randn(1, 8, *SIZE))
