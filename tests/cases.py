"""What several test files share: partitions worth testing, inputs, norms that do something, relative errors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isa_triton import Partition

# H != W everywhere; every kind of partition; sizes P divides and does not; groups of one token and of the whole map.
PARTITIONS = {
    "interlaced": Partition.interlaced((6, 8), stride=(2, 4)),
    "interlaced-ragged": Partition.interlaced((7, 5), stride=(3, 2)),
    "interlaced-one-token": Partition.interlaced((4, 5), stride=(4, 5)),
    "interlaced-one-group": Partition.interlaced((4, 5), stride=(1, 1)),
    "grid": Partition.interlaced((6, 8), grid=(3, 2)),
    "grid-ragged": Partition.interlaced((7, 9), grid=(4, 5)),
    "local": Partition.local((6, 8), window=(3, 4)),
    "local-ragged": Partition.local((7, 5), window=(4, 3)),
    "local-one-token": Partition.local((5, 4), window=(1, 1)),
    "shifted": Partition.local((6, 8), window=(3, 4), shift=(1, 2)),
    "shifted-ragged": Partition.local((7, 5), window=(4, 3), shift=(3, 1)),
    "rows": Partition.rows((5, 7)),
    "columns": Partition.columns((5, 7)),
    "dense": Partition.dense((3, 5)),
    "one-pixel": Partition.dense((1, 1)),
}


def qkv(
    partition: Partition,
    batch: int = 2,
    heads: int = 2,
    key_width: int = 3,
    value_width: int = 5,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal q, k [B, H, W, heads, K] and v [B, H, W, heads, V] on the partition's map."""
    shape = (batch, *partition.size, heads)
    q, k = torch.randn(2, *shape, key_width, dtype=dtype)
    return q, k, torch.randn(*shape, value_width, dtype=dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest entry (of 1 where all are smaller)."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1))


def lively(module: nn.Module) -> nn.Module:
    """Batch normalisation that is not the identity, in fp64."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return module.double()


class NCHWBatchNorm(nn.BatchNorm2d):
    """On NCHW maps: on a CPU PyTorch sums those that are channels_last less accurately, and later layers amplify it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())
