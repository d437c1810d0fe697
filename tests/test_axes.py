"""The layers over lines, maps and volumes: the paper's block is the same on one, two and three axes."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor, nn

import reference
from isa_triton import InterlacedSparseSelfAttention, ISAModule, SelfAttention1d, SelfAttention2d, SelfAttention3d
from isa_triton.inference import FoldedAttention, fuse
from isa_triton.norm import BATCH_NORMS, as_map, from_map
from isa_triton.sharding import parallel
from tests.cases import assert_same, outputs_and_gradients, relative_error

SIZES = {
    "line": ((29,), (6,)),
    "map": ((9, 11), (4, 3)),
    "volume": ((5, 7, 6), (2, 3, 4)),
    "whole": ((4, 6, 4), (2, 3, 2)),
}
every_size = pytest.mark.parametrize(("size", "p"), SIZES.values(), ids=SIZES.keys())
WIDTHS = 6, 4, 5, 7  # in, keys, values, out


def randomised(module: nn.Module) -> nn.Module:
    """In fp64, its normalisations no identities."""
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        if "norm" in name and x.is_floating_point():
            nn.init.uniform_(x, 0.5, 1.5)
    return module.double()


@pytest.mark.parametrize("batch", [1, 3])
def test_volumes_are_maps_of_the_same_pixels_and_back_in_their_layout(batch: int) -> None:
    x = torch.randn(batch, 5, 3, 4, 6).to(memory_format=torch.channels_last_3d)
    as_it_lies = as_map(x)
    assert as_it_lies.stride() == torch.empty(as_it_lies.shape).to(memory_format=torch.channels_last).stride()
    back = from_map(as_it_lies, x.shape[2:])
    assert (back.stride(), back.data_ptr()) == (x.stride(), x.data_ptr())
    assert torch.equal(back, x)


@pytest.mark.parametrize("size", [(600,), (20, 30), (6, 10, 10)], ids=str)
def test_normalised_pixels_are_the_same_on_any_number_of_axes_and_no_view(size: tuple[int, ...]) -> None:
    line, norm = torch.randn(1, 600, 8).mT, BATCH_NORMS[len(size)]  # channels last
    x = line.unflatten(2, size)
    assert not norm(8)(x.clone().requires_grad_())._is_view()  # autograd copies views that are written to
    actual = outputs_and_gradients(nn.Sequential(norm(8), nn.ReLU(inplace=True)), x)
    expected = outputs_and_gradients(nn.Sequential(nn.BatchNorm1d(8), nn.ReLU()).double(), line.double())
    assert_same({name: x.flatten(2) if x.dim() > 2 else x for name, x in actual.items()}, expected, 1e-6)


def test_lines_keep_their_layout_in_evaluation() -> None:
    norm, line = BATCH_NORMS[1](8).eval(), torch.randn(2, 600, 8).mT  # channels last
    nn.init.uniform_(norm.running_var, 0.5, 1.5), nn.init.normal_(norm.running_mean)
    assert norm(line).stride() == line.stride()
    theirs = nn.BatchNorm1d(8).eval()
    theirs.load_state_dict(norm.state_dict())
    assert relative_error(norm(line), theirs(line)) < 1e-6


@every_size
@pytest.mark.parametrize("padding", ["zeros", "mask"])
@pytest.mark.parametrize("order", ["long-short", "short-long"])
def test_the_block_is_the_reference_on_any_number_of_axes(
    size: tuple[int, ...], p: tuple[int, ...], padding: str, order: str
) -> None:
    theirs = randomised(reference.InterlacedSparseSelfAttention(*WIDTHS, p, order, padding))
    ours = InterlacedSparseSelfAttention(*WIDTHS, axes=len(p), partition_size=p, order=order, padding=padding).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 6, *size, dtype=torch.float64)
    assert_same(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x), 1e-11)
    ours.eval(), theirs.eval()
    assert_same(outputs_and_gradients(ours, x), outputs_and_gradients(theirs, x), 1e-11)


@every_size
def test_folded_and_compiled_they_are_the_same(size: tuple[int, ...], p: tuple[int, ...]) -> None:
    layer = randomised(ISAModule(6, 4, 5, 7, axes=len(p), partition_size=(p, tuple(2 for _ in p)), num_heads=1)).eval()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    folded = fuse(copy.deepcopy(layer))
    parts = dict(folded.named_modules())
    assert {type(parts[f"branches.{i}"]) for i in (0, 1)} == {FoldedAttention}
    assert relative_error(folded(x), layer(x)) < 1e-12
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), layer(x)) < 1e-12


@every_size
def test_every_voxel_sees_every_voxel_through_one_intermediate(size: tuple[int, ...], p: tuple[int, ...]) -> None:
    """Of long range, then short: the first stage's group of a target's window holds each source once."""
    layer = InterlacedSparseSelfAttention(*WIDTHS, axes=len(p), partition_size=p, padding="mask")
    long_range, short_range = (stage.partition(size) for stage in layer.stages)
    pixels = list(product(*map(range, size)))
    seats = {pixel: (long_range.seat(*pixel)[0], short_range.seat(*pixel)[0]) for pixel in pixels}
    ways = dict.fromkeys(product(range(long_range.groups), range(short_range.groups)), 0)
    for seat in seats.values():
        ways[seat] += 1
    assert max(ways.values()) == 1  # never through two
    if long_range.divides:
        assert set(ways.values()) == {1}
    x = torch.randn(1, 6, *size, dtype=torch.float64, requires_grad=True)
    y = layer.double().eval()(x)
    for pixel in (pixels[0], pixels[len(pixels) // 2], pixels[-1]):
        (gradient,) = torch.autograd.grad(y[(0, slice(None), *pixel)].sum(), x, retain_graph=True)
        reached = (gradient[0] != 0).any(0)
        assert bool(reached.all()) or not long_range.divides


def test_a_map_of_one_row_is_a_line_and_one_of_one_slice_a_map() -> None:
    flat, thin, deep = (
        kind(6, 4, 5, pattern="local", partition_size=size).double()
        for kind, size in ((SelfAttention1d, 4), (SelfAttention2d, (1, 4)), (SelfAttention3d, (1, 1, 4)))
    )
    for other in (thin, deep):
        state = {
            name: x.view_as(other.state_dict()[name]) if x.dim() > 1 else x for name, x in flat.state_dict().items()
        }
        other.load_state_dict(state)
    x = torch.randn(3, 6, 11, dtype=torch.float64)
    line: Tensor = flat(x)
    assert relative_error(thin(x[:, :, None]).squeeze(2), line) < 1e-12
    assert relative_error(deep(x[:, :, None, None]).flatten(2), line) < 1e-12


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="axes must be 1, 2 or 3, got 4"):
        InterlacedSparseSelfAttention(*WIDTHS, axes=4)
    with pytest.raises(
        ValueError, match=r"partition_size must be three integers \(P_d, P_h, P_w\) of at least 1, or one"
    ):
        InterlacedSparseSelfAttention(*WIDTHS, axes=3, partition_size=(4, 4))
    with pytest.raises(ValueError, match=r"x must be \[B, 6, D, H, W\] with D, H, W of at least 1, got \(1, 6, 4, 4\)"):
        SelfAttention3d(6, 4, 5, pattern="dense")(torch.zeros(1, 6, 4, 4))
    with pytest.raises(ValueError, match="pattern must be one of 'interlaced', 'local', 'dense', got 'rows'"):
        SelfAttention1d(6, 4, 5, pattern="rows")


def test_volumes_are_not_spread_over_devices() -> None:
    module = InterlacedSparseSelfAttention(*WIDTHS, axes=3, partition_size=2)
    with pytest.raises(ValueError, match="maps of two axes alone are spread over devices, and long_range has 3"):
        parallel._check(module)
