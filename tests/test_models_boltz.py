"""Boltz's triangle attention, accelerated."""

from __future__ import annotations

import copy

import pytest
import torch

from bench.models.exact import network, typed
from isa_triton.models import accelerate
from tests.accelerated_models import zoo

ENTRIES = zoo("boltz")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_keys_attend_to_all_as_theirs_do(dtype: torch.dtype) -> None:
    """Boltz's mask is -1e9: a row without keys forgets its scores: all of them in fp32, eight digits in fp64."""
    theirs = network(ENTRIES[0], dtype)
    z, mask = typed(ENTRIES[0].inputs((16,)), dtype)
    mask[:, 5] = mask[:, :, 7] = 0
    ours = accelerate(copy.deepcopy(theirs), backend="eager")
    with torch.no_grad():
        expected = theirs(z, mask)
        torch.testing.assert_close(ours(z, mask), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(ours(z, torch.ones_like(mask)), expected, atol=1e-3)  # the mask matters


def test_more_leading_axes_are_maps_of_their_own() -> None:
    z, mask = (torch.stack([x, x.roll(1, 1)]) for x in ENTRIES[0].inputs((7,)))
    theirs = network(ENTRIES[0]).get_submodule("starting")
    ours = accelerate(copy.deepcopy(theirs))
    torch.testing.assert_close(ours(z, mask), theirs(z, mask), rtol=1e-10, atol=1e-10)
