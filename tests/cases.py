"""What several test files share: partitions worth testing, inputs, modules that do something, what a pass computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from isa_triton import Axis, Partition

# H != W everywhere; every kind of partition; sizes P divides and does not; groups of one token and of the whole map;
# lines and volumes; windows that go on beyond a seam.
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
    "line": Partition.local((11,), window=(4,), shift=(1,)),
    "volume": Partition.local((4, 6, 8), window=(2, 3, 4)),
    "volume-shifted-ragged": Partition.local((3, 5, 4), window=(2, 4, 3), shift=(1, 2, 0)),
    "volume-interlaced-ragged": Partition.interlaced((3, 4, 5), stride=(2, 3, 2)),
    "volume-mixed": Partition(Axis.interlaced(5, 2), Axis.local(4, 3), Axis.each(2)),
    "cyclic": Partition.local((6, 8), window=(3, 4), shift=(1, 3), cyclic=(False, True)),
    "cyclic-ragged": Partition.local((4, 5, 7), window=(2, 3, 4), shift=(1, 2, 1), cyclic=(True, False, True)),
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


def with_random_statistics(module: nn.Module) -> nn.Module:
    """The module in fp64, its batch normalisations no identities."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            if norm.running_mean is not None:
                nn.init.normal_(norm.running_mean)
                nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return module.double()


# -- what a pass computes, and how far it is from what another does ----------------------------------------------------


def outputs_and_gradients(
    module: nn.Module,
    x: Tensor,
    call: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__,
    place: Callable[[Tensor], Tensor] = torch.clone,
) -> dict[str, Tensor]:
    """The output, the gradients of the input and of all parameters, and the buffers after one pass.

    Args:
        call: what is computed, if not module(x).
        place: puts x, and the gradient of the output, where the module wants them.
    """
    module.zero_grad()
    x = place(x).requires_grad_()
    y = call(module, x)
    upstream = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    y.backward(place(upstream))
    gradients = {"x.grad": x.grad} | {name: parameter.grad for name, parameter in module.named_parameters()}
    missing = [name for name, gradient in gradients.items() if gradient is None]
    assert not missing, f"no gradient of {', '.join(missing)}"
    results = {"output": y.detach()} | gradients | dict(module.named_buffers())
    return {name: result.clone() for name, result in results.items() if result is not None}


def relative_error(actual: Tensor, expected: Tensor, floor: float = 1.0) -> float:
    """The largest difference, as a part of the largest entry (of `floor` where all are smaller)."""
    assert actual.shape == expected.shape
    if actual.numel() == 0:
        return 0.0
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=floor))


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor], floor: float = 1.0) -> dict[str, float]:
    """The relative error of every tensor of a pass."""
    assert actual.keys() == expected.keys()
    return {name: relative_error(actual[name], expected[name], floor) for name in expected}


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12, floor: float = 1.0
) -> None:
    """Two passes are one function, to a relative error of less than `tolerance` in every tensor."""
    errors = relative_errors(actual, expected, floor)
    assert {name: error for name, error in errors.items() if not error < tolerance} == {}
