"""The modules equal the plain reference in outputs, gradients and batch statistics, and behave as torch layers do."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isa_triton
import reference
from isa_triton import InterlacedSparseSelfAttention, ISAHead, ISAModule, SelfAttention2d, set_backend
from isa_triton.inference import fuse
from isa_triton.maps import Conv1x1
from tests.cases import assert_same, outputs_and_gradients, relative_error, with_random_statistics


def assert_same_function(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    assert_same(outputs_and_gradients(a, x), outputs_and_gradients(b, x))


@pytest.mark.parametrize("size", [(16, 24), (17, 29), (7, 5), (1, 9)], ids=str)
@pytest.mark.parametrize("order", ["long-short", "short-long"])
@pytest.mark.parametrize("padding", ["zeros", "mask"])
@pytest.mark.parametrize("training", [True, False])
def test_the_layer_equals_the_reference(size: tuple[int, int], order: str, padding: str, training: bool) -> None:
    options: dict[str, Any] = {"order": order, "padding": padding}
    ours = with_random_statistics(InterlacedSparseSelfAttention(6, 4, 5, 7, partition_size=(8, 4), **options))
    theirs = reference.InterlacedSparseSelfAttention(6, 4, 5, 7, (8, 4), **options).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    assert_same_function(ours.train(training), theirs.train(training), x)


@pytest.mark.parametrize(("pattern", "name"), [("interlaced", "long"), ("local", "short"), ("dense", "dense")])
def test_a_stage_equals_the_reference(pattern: str, name: str) -> None:
    ours = with_random_statistics(SelfAttention2d(6, 4, 5, 7, pattern=pattern, partition_size=(2, 3)))
    theirs = reference.SelfAttention(6, 4, 5, 7, name, (2, 3)).double()
    theirs.load_state_dict(ours.state_dict())
    assert_same_function(ours, theirs, torch.randn(2, 6, 4, 9, dtype=torch.float64))


@pytest.mark.parametrize("axis", [2, 3])
def test_rows_and_columns_attend_along_one_axis(axis: int) -> None:
    layer = with_random_statistics(SelfAttention2d(6, 8, 8, 32, pattern="columns" if axis == 2 else "rows")).eval()
    x = torch.randn(1, 6, 5, 7, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 2, 3] += 1
    moved = (layer(x) != layer(changed)).any(1)[0]
    line = moved[:, 3] if axis == 2 else moved[2]
    assert line.all()
    assert moved.sum() == line.numel()


def test_both_paddings_agree_where_the_partition_divides() -> None:
    x = torch.randn(2, 6, 8, 12, dtype=torch.float64)
    zeros = with_random_statistics(InterlacedSparseSelfAttention(6, 4, 5, partition_size=(4, 3)))
    mask = InterlacedSparseSelfAttention(6, 4, 5, partition_size=(4, 3), padding="mask").double()
    mask.load_state_dict(zeros.state_dict())
    assert_same_function(zeros, mask, x)


def test_padding_is_centred_with_the_small_half_first() -> None:
    x = torch.ones(1, 1, 5, 7)
    padded = isa_triton.maps.pad_to_multiple(x, (4, 6))  # 3 more rows, 5 more columns
    assert padded.shape == (1, 1, 8, 12)
    assert torch.equal(padded[0, 0].nonzero()[[0, -1]], torch.tensor([[1, 2], [5, 8]]))
    assert torch.equal(isa_triton.maps.crop(padded, (5, 7)), x)
    assert isa_triton.maps.pad_to_multiple(padded, (4, 6)) is padded


def test_padded_pixels_enter_batch_statistics_and_masked_ones_do_not_exist() -> None:
    x = torch.rand(1, 6, 5, 7, dtype=torch.float64) + 1
    means = {}
    for padding in ("zeros", "mask"):
        torch.manual_seed(1)
        layer = SelfAttention2d(6, 4, 5, pattern="local", partition_size=(4, 4), padding=padding).double()
        layer(x)
        norm = layer.query[0].norm
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        means[padding] = norm.running_mean
    assert torch.allclose(means["zeros"], means["mask"] * (5 * 7) / (8 * 8))


def test_several_partition_sizes_are_parallel_branches() -> None:
    module = with_random_statistics(ISAModule(6, 4, 5, 7, partition_size=((2, 2), (4, 3)))).eval()
    x = torch.randn(2, 6, 8, 9, dtype=torch.float64)
    assert isinstance(module, ISAModule)
    parts = [module.expand(x), *(branch(x) for branch in module.branches)]
    fuse = module.fuse
    plain = fuse.relu(fuse.norm(nn.functional.conv2d(torch.cat(parts, 1), fuse.conv.weight)))
    assert relative_error(module(x), plain) < 1e-14
    assert [part.shape[1] for part in parts] == [14, 7, 7]


def test_dropout_drops_whole_channels_in_training_only() -> None:
    module = ISAModule(6, 4, 5, 64, dropout=0.5)
    module.fuse.norm.bias.data.fill_(10.0)  # no output is zero by ReLU
    dropped = (module(torch.randn(1, 6, 8, 8)) == 0).flatten(2)
    assert torch.equal(dropped.any(2), dropped.all(2))
    assert 0 < dropped.all(2).sum() < 64
    assert (module.eval()(torch.randn(1, 6, 8, 8)) != 0).all()


def test_head_classifies_every_pixel_and_upsamples() -> None:
    head = ISAHead(12, 8, 3, key_channels=4, partition_size=(4, 4)).eval()
    x = torch.randn(2, 12, 6, 9)
    logits = head(x)
    assert logits.shape == (2, 3, 6, 9)
    assert head(x, size=(48, 72)).shape == (2, 3, 48, 72)


def test_modules_of_the_published_sizes_have_the_published_parameters() -> None:
    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(SelfAttention2d(512, 256, 512, pattern="local")) == 920_576
    assert count(ISAModule(512, 256, 512, 512)) == 2_366_464
    head = ISAHead(2048, 512, 19)
    assert count(head) - count(head.classifier) == 11_804_672


@pytest.mark.parametrize("bias", [False, True])
def test_conv1x1_is_a_convolution_of_the_concatenation(bias: bool) -> None:
    conv = Conv1x1(9, 4, bias=bias).double()
    a, b = torch.randn(2, 3, 5, 7, dtype=torch.float64), torch.randn(2, 6, 5, 7, dtype=torch.float64)
    b = b.contiguous(memory_format=torch.channels_last)
    expected = nn.functional.conv2d(torch.cat([a, b], 1), conv.weight, conv.bias)
    assert relative_error(conv(a, b), expected) < 1e-14
    assert conv(a, b).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_projections_copy_no_input(memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GEMM reads x itself, NCHW or channels_last, and q, k, v are views of what GEMM and norm wrote."""
    seen: list[Tensor] = []

    def spied(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def spy(a: Tensor, *others: Any, **options: Any) -> Tensor:
            seen.append(a)
            return product(a, *others, **options)

        return spy

    monkeypatch.setattr(torch, "bmm", spied(torch.bmm))
    monkeypatch.setattr(isa_triton.maps.F, "conv2d", spied(isa_triton.maps.F.conv2d))
    x = torch.randn(2, 6, 48, 40).contiguous(memory_format=memory_format)
    Conv1x1(6, 4)(x)
    assert [a.data_ptr() for a in seen] == [x.data_ptr()]
    assert seen[0].shape == ((2, 6, 48, 40) if memory_format == torch.channels_last else (2, 1920, 6))
    monkeypatch.undo()
    given: list[Tensor] = []
    attention = isa_triton.maps.partitioned_attention

    def spy(*arguments: Any, **options: Any) -> Tensor:
        given.extend(arguments[:3])
        return attention(*arguments, **options)

    monkeypatch.setattr(isa_triton.maps, "partitioned_attention", spy)
    SelfAttention2d(6, 4, 5, pattern="local", partition_size=(4, 4))(x)
    assert all(t.is_contiguous() for t in given)


def test_layouts_of_the_input_do_not_change_the_result() -> None:
    layer = with_random_statistics(InterlacedSparseSelfAttention(6, 4, 5, partition_size=(4, 3))).eval()
    x = torch.randn(2, 6, 7, 10, dtype=torch.float64)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: torch.cat([x, x], 1)[:, :6],
        lambda x: torch.cat([x, x], 3)[..., :10],
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    ]
    for layout in layouts:
        assert relative_error(layer(layout(x)), layer(x)) < 1e-14


def test_state_dicts_and_copies_round_trip() -> None:
    module = with_random_statistics(ISAModule(6, 4, 5, 7)).eval()
    fresh = ISAModule(6, 4, 5, 7).double().eval()
    fresh.load_state_dict(module.state_dict())
    x = torch.randn(1, 6, 9, 11, dtype=torch.float64)
    assert torch.equal(fresh(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_autocast_runs_in_half_and_trains() -> None:
    module = ISAModule(8, 8, 8, 8, partition_size=((4, 4),), dropout=0.0)
    x = torch.randn(1, 8, 9, 13)
    expected = copy.deepcopy(module)(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert relative_error(y.float(), expected) < 0.05
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_compiles_in_one_graph_for_several_sizes(training: bool) -> None:
    layer = with_random_statistics(InterlacedSparseSelfAttention(6, 4, 5, partition_size=(4, 3))).train(training)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for size in ((8, 12), (9, 11), (13, 10)):
        x = torch.randn(2, 6, *size, dtype=torch.float64)
        ours, theirs = (f(x) for f in (compiled, twin))
        assert relative_error(ours, theirs) < 1e-12
        if training:
            ours.sum().backward()
            theirs.sum().backward()
    for (name, a), b in zip(layer.named_parameters(), twin.parameters(), strict=True):
        if training:
            assert relative_error(a.grad, b.grad) < 1e-10, name


def test_an_exported_layer_is_the_same_function() -> None:
    layer = with_random_statistics(InterlacedSparseSelfAttention(6, 4, 5, partition_size=(4, 3))).eval()
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64)
    exported = torch.export.export(layer, (x,)).module()
    assert relative_error(exported(x), layer(x)) < 1e-14
    for module in (exported, layer):
        module(x).sum().backward()
    gradients = dict(layer.named_parameters())
    for name, parameter in exported.named_parameters():
        assert relative_error(parameter.grad, gradients[name].grad) < 1e-12


def test_every_pixel_reaches_every_pixel() -> None:
    """The support of the whole layer on a map that P divides: any input pixel moves every output pixel."""
    layer = with_random_statistics(InterlacedSparseSelfAttention(6, 4, 16, partition_size=(2, 3))).eval()
    x = torch.randn(1, 6, 4, 9, dtype=torch.float64)
    for y, column in product((0, 3), (0, 4, 8)):
        changed = x.clone()
        changed[:, :, y, column] += 1
        assert (layer(x) != layer(changed)).any(1).all()


def test_one_assignment_sets_the_backend_of_all_stages_inside() -> None:
    head = ISAHead(6, 6, 3, key_channels=4, partition_size=((2, 3), (3, 2)))
    stages = [part for part in head.modules() if isinstance(part, SelfAttention2d)]
    assert (len(stages), head.backend, head.isa.branches[1].backend) == (4, "auto", "auto")
    branches: Any = head.isa.branches
    branches[1].backend = "triton"
    assert [stage.backend for stage in stages] == ["auto", "auto", "triton", "triton"]
    assert head.backend == "auto, triton"
    head.backend = "eager"
    assert {stage.backend for stage in stages} == {"eager"}
    folded: Any = fuse(head)
    assert set_backend(nn.Sequential(folded, head), "triton")[0] is folded
    assert [part.backend for part in (folded, head)] == ["triton", "triton"]
    with pytest.raises(ValueError, match=r"backend='triton' cannot be had"):
        head.double()(torch.randn(2, 6, 7, 9, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'triton', 'eager', got 'gpu'"):
        set_backend(folded, "gpu")
    with pytest.raises(ValueError, match=r"network must hold a layer of isa_triton that attends, got ReLU"):
        set_backend(nn.ReLU(), "eager")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layouts", ["nchw nhwc", "nhwc nhwc", "nhwc nchw", "nhwc", "nchw"])
def test_projections_are_convolutions_however_their_inputs_lie(layouts: str, bias: bool) -> None:
    """Rows of 32 pixels by oneDNN's convolution, others by a matrix product; outputs and gradients in fp32."""
    formats = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
    widths = (5, 7)[: len(layouts.split())]
    conv = Conv1x1(sum(widths), 6, bias=bias)
    inputs = [
        torch.randn(3, width, 9, 13).contiguous(memory_format=formats[layout]).requires_grad_()
        for width, layout in zip(widths, layouts.split(), strict=True)
    ]
    upstream = torch.randn(3, 6, 9, 13)
    leaves = [*inputs, *conv.parameters()]
    y = conv(*inputs)
    expected = nn.functional.conv2d(torch.cat(inputs, 1), conv.weight, conv.bias)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(y, expected) < 1e-5
    for ours, theirs in zip(*(torch.autograd.grad(out, leaves, upstream) for out in (y, expected)), strict=True):
        assert relative_error(ours, theirs) < 1e-5
    copies = torch.stack([inputs[-1], 2 * inputs[-1]])  # over one input alone
    mapped = torch.func.vmap(lambda x: conv(*inputs[:-1], x))(copies)
    assert relative_error(mapped, torch.stack([conv(*inputs[:-1], x) for x in copies])) < 1e-5
