"""MONAI's Swin UNETR, accelerated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.models.exact import network, typed
from bench.models.zoo import Entry
from isa_triton.models import accelerate, report, restore
from tests.accelerated_models import check_same_function, zoo

ENTRIES = zoo("monai")
IMAGES, VOLUMES = ENTRIES[:2]


@pytest.mark.parametrize("options", [{"use_checkpoint": True}, {"use_flash_attention": True}], ids=str)
def test_options_compute_the_same(options: dict[str, bool]) -> None:
    from bench.models.zoo.monai import encoder

    entry = Entry("monai", str(options), lambda: encoder(2, 7, **options), IMAGES.inputs, IMAGES.sizes, IMAGES.result)
    check_same_function(entry, entry.sizes[0])
    model, inputs = network(entry), typed(entry.inputs(entry.sizes[0]), torch.float64)
    with torch.no_grad():
        expected = entry.result(model(*inputs))
        torch.testing.assert_close(entry.result(accelerate(model)(*inputs)), expected, rtol=1e-10, atol=1e-10)


def masks(model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many are made."""
    made: list[Any] = []
    module = pytest.importorskip("monai.networks.nets.swin_unetr")
    compute_mask = module.compute_mask

    def counted(*args: Any) -> Tensor:
        made.append(args)
        return compute_mask(*args)

    monkeypatch.setattr(module, "compute_mask", counted)
    model(x)
    monkeypatch.undo()
    return len(made)


def test_masks_are_made_only_where_a_block_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x,) = network(IMAGES), IMAGES.inputs(IMAGES.sizes[0])
    assert masks(model, x, monkeypatch) == 4
    accelerate(model, backend="eager")
    assert masks(model, x, monkeypatch) == 0
    accelerate(model)
    with torch.no_grad():
        assert masks(model, x, monkeypatch) == 0
    assert masks(model, x, monkeypatch) == 2  # in training, of the stages that have a shifted block
    assert masks(restore(model), x, monkeypatch) == 4
    volumes, (x,) = accelerate(network(VOLUMES)), VOLUMES.inputs(VOLUMES.sizes[0])
    assert masks(volumes, x, monkeypatch) == 0


def test_a_block_of_somebody_else_gets_its_mask() -> None:
    from monai.networks.nets.swin_unetr import SwinTransformerBlock

    class Other(SwinTransformerBlock):
        pass

    theirs, inputs = network(IMAGES), typed(IMAGES.inputs(IMAGES.sizes[1]), torch.float64)
    shifted: Any = theirs.get_submodule("layers1.0.blocks.1")
    shifted.__class__ = Other
    ours = accelerate(copy.deepcopy(theirs), backend="eager")
    assert [finding.why for finding in report(ours) if not finding.taken] == [
        "a subclass of SwinTransformerBlock, which may do something else"
    ]
    torch.testing.assert_close(IMAGES.result(ours(*inputs)), IMAGES.result(theirs(*inputs)), rtol=1e-10, atol=1e-10)


def test_the_whole_network_is_the_same() -> None:
    from monai.networks.nets import SwinUNETR

    model = SwinUNETR(1, 2, feature_size=12, depths=(2, 1, 1, 1), num_heads=(3, 3, 3, 3)).double().eval()
    x = torch.randn(1, 1, 32, 32, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(accelerate(model)(x), expected, rtol=1e-9, atol=1e-9)
