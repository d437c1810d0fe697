"""transformers' Hiera and that of its SAM 2, accelerated."""

from __future__ import annotations

import copy

import pytest
import torch

from bench.models.exact import network
from bench.models.zoo import Entry
from isa_triton.models import accelerate
from tests.accelerated_models import zoo

ENTRIES = zoo("transformers_hiera")


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_what_attention_returns_is_shown_as_theirs(entry: Entry) -> None:
    theirs, (x,) = network(entry), entry.inputs((64, 96))
    ours = accelerate(copy.deepcopy(theirs))
    with torch.no_grad():
        expected, shown = (model(x, output_attentions=True).attentions for model in (theirs, ours))
    assert len(shown) > 1
    torch.testing.assert_close(shown, expected)
