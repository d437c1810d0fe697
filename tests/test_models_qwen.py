"""The vision tower of Qwen2.5-VL, accelerated. Theirs is no one graph: it reads the sizes of images as numbers."""

from __future__ import annotations

import copy

import pytest
import torch

from bench.models.exact import network
from isa_triton.models import accelerate
from tests.accelerated_models import zoo
from tests.cases import relative_error

ENTRIES = zoo("transformers_qwen")


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_images_of_several_sizes_are_one_launch(backend: str) -> None:
    """Two pictures, one smaller than a window, and a video: outputs and all gradients."""
    theirs, grid = network(ENTRIES[0]), torch.tensor([[1, 16, 24], [1, 4, 6], [3, 18, 10]])
    ours = accelerate(copy.deepcopy(theirs), backend=backend)
    x = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 14 * 14, dtype=torch.float64)
    results = [ENTRIES[0].result(model(x, grid)) for model in (theirs, ours)]
    assert relative_error(results[1], results[0]) < 1e-12
    upstream = torch.randn_like(results[0])
    for result in results:
        result.backward(upstream)
    for (name, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert parameter.grad is not None
        assert expected.grad is not None
        assert relative_error(parameter.grad, expected.grad, floor=1e-3) < 1e-10, name


def test_the_tokens_of_every_layer_are_sorted_as_theirs_are() -> None:
    theirs, inputs = network(ENTRIES[0]), ENTRIES[0].inputs((1, 8, 12))
    ours = accelerate(copy.deepcopy(theirs))
    with torch.no_grad():
        layers = [model(*inputs, output_hidden_states=True).hidden_states for model in (theirs, ours)]
    assert len(layers[0]) == 4
    torch.testing.assert_close(layers[1], layers[0])
    assert torch.equal(ours(*inputs, return_dict=False)[1], ours(*inputs).pooler_output)
