"""Several heads are attentions side by side, each on its part of the channels; one head is what the paper has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isa_triton import InterlacedSparseSelfAttention, ISAHead, ISAModule, SelfAttention2d
from isa_triton.inference import fuse
from isa_triton.maps import PATTERNS, attend_maps, make_partition
from tests.cases import relative_error

HEADS, K, V = 3, 6, 9


@pytest.mark.parametrize("pattern", PATTERNS)
def test_each_head_attends_with_its_own_channels(pattern: str) -> None:
    partition = make_partition(pattern, (7, 10), (3, 4))
    q, k = torch.randn(2, 2, K, 7, 10, dtype=torch.float64)
    v = torch.randn(2, V, 7, 10, dtype=torch.float64)
    together = attend_maps(q, k, v, partition, HEADS, "eager")
    apart = [
        attend_maps(*parts, partition, 1, "eager")
        for parts in zip(*(x.chunk(HEADS, 1) for x in (q, k, v)), strict=True)
    ]
    assert relative_error(together, torch.cat(apart, 1)) < 1e-13


WIDTHS: Any = (5, K, V)
OPTIONS: Any = {"partition_size": (3, 4), "num_heads": HEADS}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "stage": lambda: SelfAttention2d(*WIDTHS, pattern="interlaced", **OPTIONS),
    "isa": lambda: InterlacedSparseSelfAttention(*WIDTHS, **OPTIONS),
    "module": lambda: ISAModule(*WIDTHS, 7, **OPTIONS),
    "head": lambda: ISAHead(5, V, 4, key_channels=K, **OPTIONS),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_pass_their_heads_on_and_fold_exactly(name: str) -> None:
    layer = LAYERS[name]().double().eval()
    stages = [stage for stage in layer.modules() if isinstance(stage, SelfAttention2d)]
    assert {stage.num_heads for stage in stages} == {HEADS}
    x = torch.randn(2, 5, 7, 10, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert relative_error(fuse(layer)(x), y) < 1e-12
    for stage in stages:
        stage.num_heads = 1
    assert relative_error(layer(x), y) > 1e-6  # heads make a difference here
    (gradient,) = torch.autograd.grad(y.sin().sum(), x)
    assert gradient.isfinite().all()


def test_one_number_stands_for_both_sides_of_a_partition() -> None:
    assert SelfAttention2d(4, 2, 3, pattern="local", partition_size=5).partition_size == (5, 5)
    (branch,) = ISAModule(4, 2, 3, 4, partition_size=5).branches
    assert branch.get_submodule("long_range").partition_size == (5, 5)
    assert len(ISAModule(4, 2, 3, 4, partition_size=((2, 3), (4, 5))).branches) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 4}, "key_channels must be a multiple of num_heads, 4, got 6"),
        ({"num_heads": 2}, "value_channels must be a multiple of num_heads, 2, got 9"),
        ({"num_heads": 0}, "num_heads must be an integer of at least 1, got 0"),
    ],
)
@pytest.mark.parametrize("make", [SelfAttention2d, InterlacedSparseSelfAttention, ISAModule])
def test_heads_that_do_not_divide_the_widths_are_refused(
    make: type[nn.Module], options: dict[str, int], message: str
) -> None:
    more = {"pattern": "local"} if make is SelfAttention2d else {}
    with pytest.raises(ValueError, match=message):
        make(5, K, V, 7, **more, **options)


@pytest.mark.parametrize("make", [InterlacedSparseSelfAttention, ISAModule])
def test_an_option_that_a_layer_does_not_take_is_refused_in_its_name(make: type[nn.Module]) -> None:
    with pytest.raises(
        TypeError, match=f"{make.__name__} takes no heads; its options are activation, attention_dropout"
    ):
        make(5, K, V, 7, heads=3)


def test_the_default_is_one_head() -> None:
    def output(layer: nn.Module) -> Tensor:
        torch.manual_seed(1)
        return layer.double().eval()(torch.randn(1, 5, 6, 8, dtype=torch.float64))

    torch.manual_seed(0)
    default = SelfAttention2d(5, K, V, pattern="dense")
    assert default.num_heads == 1
    one = SelfAttention2d(5, K, V, pattern="dense", num_heads=1)
    one.load_state_dict(default.state_dict())
    assert torch.equal(output(default), output(one))
