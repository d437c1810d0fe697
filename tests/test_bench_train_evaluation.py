"""Evaluation of `bench train`: windows, scales and mirrors are averaged, IoU counts pixels of all images together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.train.evaluation import intersection_over_union, probabilities, slide, strips, window_starts
from bench.train.recipe import IGNORED


@pytest.mark.parametrize("length", [1, 7, 8, 9, 50])
@pytest.mark.parametrize("window", [1, 8, 9])
def test_windows_cover_a_length_and_overlap_by_a_third(length: int, window: int) -> None:
    begins = window_starts(length, window)
    assert begins[0] == 0
    assert begins[-1] + window == max(length, window)
    assert all(0 < b - a <= max(1, window * 2 / 3) for a, b in pairwise(begins))


@pytest.mark.parametrize("size", [(13, 22), (8, 12), (5, 30), (3, 4)], ids=str)
def test_sliding_a_function_of_single_pixels_is_the_function(size: tuple[int, int]) -> None:
    seen = []

    def network(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[2:]))
        return torch.cat([x, x**2], 1)

    x = torch.randn(1, 3, *size, dtype=torch.float32)
    assert torch.allclose(slide(network, x, (8, 12)), torch.cat([x, x**2], 1))
    assert set(seen) == {(8, 12)}


def test_sliding_is_the_mean_over_the_windows_of_a_pixel() -> None:
    x = torch.randn(1, 1, 5, 3)
    total, count = torch.zeros(5), torch.zeros(5)
    for begin in window_starts(5, 3):
        total[begin : begin + 3] += torch.arange(3.0)
        count[begin : begin + 3] += 1
    y = slide(lambda x: torch.arange(3.0).view(1, 1, 3, 1).expand(1, 1, 3, 3), x, (3, 3))
    assert torch.equal(y[0, 0, :, 0], total / count)
    assert count.max() > 1


def test_what_a_window_has_beyond_the_image_is_zero_whatever_is_done_to_the_image() -> None:
    def mean(x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True).expand_as(x)

    x = torch.rand(1, 2, 3, 5)
    (y,) = strips(mean, x, (6, 10), prepare=lambda x: x + 7)
    assert torch.allclose(y, mean(x + 7) / 4)


def test_probabilities_are_the_mean_over_scales_and_mirrors() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    x, mirror = torch.randn(1, 3, 9, 14), torch.tensor([0, 2, 1, 3])

    def at(x: Tensor, scale: float) -> Tensor:
        size = [round(scale * s) for s in x.shape[2:]]
        logits = conv(F.interpolate(x, size, mode="bilinear"))
        return F.interpolate(logits, x.shape[2:], mode="bilinear").softmax(1)

    parts = [at(x, 1), at(x, 2)]
    mirrored = [at(x.flip(3), s).flip(3)[:, [0, 2, 1, 3]] for s in (1, 2)]
    window = (18, 28)
    with torch.no_grad():
        assert torch.allclose(probabilities(conv, x, (9, 14)), parts[0], atol=1e-6)
        y = probabilities(lambda x: conv(x), x, window, (2.0,), mirror)
        assert torch.allclose(y, (parts[1] + mirrored[1]) / 2, atol=1e-6)
        both = probabilities(conv, F.pad(x, (0, 0)), (9, 14), (1.0,), mirror)
        assert torch.allclose(both, (parts[0] + mirrored[0]) / 2, atol=1e-6)
        assert torch.allclose(y.sum(1), torch.ones(1, 9, 14))


def test_iou_counts_pixels_of_all_images_together() -> None:
    predicted = [(torch.randint(4, s), torch.randint(3, s)) for s in ((5, 7), (3, 4), (6, 2))]
    for _, label in predicted:
        label[0, 0] = IGNORED
    ious, mean = intersection_over_union(predicted, 6, torch.device("cpu"))
    p, y = (torch.cat([pair[i].flatten() for pair in predicted]) for i in (0, 1))
    p, y = p[y != IGNORED], y[y != IGNORED]
    expected = [float(((p == c) & (y == c)).sum() / ((p == c) | (y == c)).sum()) for c in range(4)]
    assert ious[:4] == pytest.approx(expected)
    assert ious[4:] == [None, None]
    assert mean == pytest.approx(np.mean(expected))
