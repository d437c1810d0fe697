"""Boltz's triangle attention around the starting and the ending node, of pairs of residues that partly do not exist."""

from __future__ import annotations

import torch
from boltz.model.layers.triangular_attention.attention import (
    TriangleAttentionEndingNode,
    TriangleAttentionStartingNode,
)
from torch import Tensor, nn

from bench.models.zoo import Entry, Size


class Pairs(nn.Module):
    """Both, as they follow each other in a Pairformer's layer (`boltz.model.layers.pairformer`)."""

    def __init__(self) -> None:
        super().__init__()
        self.starting = TriangleAttentionStartingNode(12, 5, 3)
        self.ending = TriangleAttentionEndingNode(12, 5, 3)

    def forward(self, z: Tensor, mask: Tensor | None) -> Tensor:
        z = z + self.starting(z, mask=mask)
        return z + self.ending(z, mask=mask, chunk_size=4)


def pairs(size: Size) -> tuple[Tensor, Tensor]:
    """Pairs of N residues of two molecules, of which the second has fewer; every row has a key."""
    (n,) = size
    there = torch.arange(n) < torch.tensor([[n], [max(1, n - 3)]])
    mask = there[:, :, None] & there[:, None, :] | torch.eye(n, dtype=torch.bool)
    return torch.randn(2, n, n, 12, dtype=torch.float64), mask.double()


def all_pairs(size: Size) -> tuple[Tensor, None]:
    return pairs(size)[0], None


SIZES = (16,), (7,), (33,)

ENTRIES = (
    Entry("boltz", "triangle attention", Pairs, pairs, SIZES),
    Entry("boltz", "triangle attention without a mask", Pairs, all_pairs, SIZES),
)
