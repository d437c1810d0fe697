"""The reference agrees with itself: two ways to write each attention, and the paper's claims about their supports."""

from __future__ import annotations

import pytest
import torch

import reference
from isa_triton import Partition
from tests.cases import qkv, relative_error

SIZE, P = (6, 8), (2, 4)
WAYS = {
    "long": (reference.long_range_attention, reference.long_range_groups),
    "short": (reference.short_range_attention, reference.short_range_groups),
}


@pytest.mark.parametrize("way", WAYS)
def test_permuting_slicing_and_the_affinity_matrix_are_one_function(way: str) -> None:
    q, k, v = qkv(Partition.dense(SIZE))
    permuted, groups = WAYS[way]
    context = permuted(q, k, v, P)
    assert relative_error(reference.masked_attention(q, k, v, groups, P), context) < 1e-14
    matrix = reference.affinity(q, k, groups, P)  # [B, heads, H W, H W]
    values = v.flatten(1, 2).transpose(1, 2)
    assert relative_error((matrix @ values).transpose(1, 2).reshape(v.shape), context) < 1e-14


def test_one_window_and_one_interval_are_dense() -> None:
    q, k, v = qkv(Partition.dense(SIZE))
    dense = reference.dense_attention(q, k, v)
    assert torch.equal(reference.short_range_attention(q, k, v, SIZE), dense)
    assert torch.equal(reference.long_range_attention(q, k, v, (1, 1)), dense)


def test_single_tokens_return_their_values() -> None:
    q, k, v = qkv(Partition.dense(SIZE))
    assert torch.equal(reference.short_range_attention(q, k, v, (1, 1)), v)
    assert torch.equal(reference.long_range_attention(q, k, v, SIZE), v)


@pytest.mark.parametrize("size", [(6, 8), (7, 5)], ids=str)
def test_two_block_diagonal_affinities_connect_every_pair(size: tuple[int, int]) -> None:
    q, k, _ = qkv(Partition.dense(size), heads=1)
    long_range = reference.affinity(q, k, reference.long_range_groups, P)
    short_range = reference.affinity(q, k, reference.short_range_groups, P)
    for matrix in (long_range, short_range):
        assert relative_error(matrix.sum(-1), torch.ones_like(matrix.sum(-1))) < 1e-14
        assert (matrix == 0).any()
    assert ((short_range @ long_range) > 0).all() == (size[0] % P[0] == 0 and size[1] % P[1] == 0)


def test_the_scale_defaults_to_the_key_width() -> None:
    q, k, v = qkv(Partition.dense(SIZE), key_width=16)
    assert torch.equal(reference.dense_attention(q, k, v), reference.dense_attention(q, k, v, scale=0.25))
