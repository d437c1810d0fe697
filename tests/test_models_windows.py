"""What networks of others have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from isa_triton import Partition
from isa_triton.models.accelerated.windows import OnMaps, attend, attend_with_zeros


class Attention(OnMaps):
    """Of maps themselves, without layers."""

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple((x + i).unflatten(-1, (2, -1)) for i in range(3))

    def output(self, context: Tensor) -> Tensor:
        return context

    def dropout_p(self) -> float:
        return 0.5


def test_the_weight_of_every_zero_is_dropped_by_itself() -> None:
    """One key in place of all zeros would be dropped with all of them, or with none."""
    attn, x = Attention(), torch.randn(3, 5, 6, 8, dtype=torch.float64)
    ragged, whole = Partition.local((5, 6), (4, 4)), Partition.local((8, 8), (4, 4))
    for training in (True, False):
        attn.train(training)
        torch.manual_seed(0)
        actual = attend_with_zeros(attn, x, ragged, "eager")
        torch.manual_seed(0)
        expected = attend(attn, F.pad(x, (0, 0, 0, 2, 0, 3)), whole, "eager")[:, :5, :6]
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
