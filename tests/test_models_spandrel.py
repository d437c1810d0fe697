"""spandrel's networks that restore images, accelerated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from bench.models.exact import network, typed
from isa_triton.models import accelerate, report, restore
from tests.accelerated_models import zoo

ENTRIES = zoo("spandrel")
SwinIRArch = pytest.importorskip("spandrel.architectures.SwinIR").SwinIRArch
# spandrel's own
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.meshgrid", "ignore:'saved_variables'", "ignore:The tensor attribute"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scales_of_cosines_end_where_theirs_do(dtype: torch.dtype) -> None:
    """At 100, whose logarithm theirs takes in fp32 whatever the network's dtype is."""
    entry = next(entry for entry in ENTRIES if entry.name == "Swin2SR")
    theirs, (x,) = network(entry, dtype), typed(entry.inputs((16, 16)), dtype)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("logit_scale"):
                parameter += torch.linspace(2, 3, len(parameter))[:, None, None]  # of log 10
        ours, expected = accelerate(copy.deepcopy(theirs), backend="eager"), theirs(x)
        tolerance = 1e-10 if dtype == torch.float64 else 1e-4
        torch.testing.assert_close(ours(x), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_a_descriptors_model_is_accelerated() -> None:
    """What `ModelLoader` makes of a checkpoint is a descriptor, whose `model` has the classes that are known."""
    entry = ENTRIES[0]
    descriptor = SwinIRArch().load(network(entry, torch.float32).state_dict())
    (x,) = typed(entry.inputs((20, 24)), torch.float32)
    with torch.no_grad():
        expected = descriptor.model.eval()(x)
        assert all(finding.taken for finding in report(accelerate(descriptor.model)))
        torch.testing.assert_close(descriptor.model(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_hats_mask_is_made_for_blocks_that_ask() -> None:
    hat: Any = accelerate(next(entry for entry in ENTRIES if entry.name == "HAT").make().eval())
    with torch.no_grad():
        assert hat.calculate_mask((16, 24), torch.float32).numel() == 0
    assert hat.calculate_mask((16, 24), torch.float32).shape == (6, 64, 64)  # on a CPU, which trains faster theirs
    restore(hat.layers[0].residual_group.blocks[1])
    with torch.no_grad():
        assert hat.calculate_mask((16, 24), torch.float32).shape == (6, 64, 64)
        findings = {finding.theirs: finding for finding in report(hat)}
    assert not findings["OCAB"].taken
    assert "overlap" in findings["OCAB"].why
