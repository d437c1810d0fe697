"""Batch normalisation over a map whose rows lie on several devices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

from ..norm import gradients_of_affine, is_for_runs, var_mean


class ShardedBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` on local pixels with the statistics of all pixels on the mesh.

    torch's SyncBatchNorm refuses CPU tensors; elsewhere, too, this one keeps nothing but its input for backward.
    `MapParallel` makes one of every batch normalisation of a layer that it shards.

    Examples:
        >>> layer = parallelize_module(InterlacedSparseSelfAttention(64, 32, 64), mesh, MapParallel())  # doctest: +SKIP
        >>> any(isinstance(part, ShardedBatchNorm2d) for part in layer.modules())  # doctest: +SKIP
        True
    """

    mesh: DeviceMesh

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return super().forward(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight = x.new_ones(x.shape[1], dtype=dtype) if self.weight is None else self.weight
        bias = x.new_zeros(x.shape[1], dtype=dtype) if self.bias is None else self.bias
        y, mean, var, n = _BatchNorm.apply(x, weight, bias, self.eps, self.mesh, counted_rows.get())
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._remember(mean, var * (n / (n - 1)))
        return y

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        for running, value in ((self.running_mean, mean), (self.running_var, var)):
            assert running is not None
            running.add_((value.to(running.dtype) - running) * factor)


counted_rows: ContextVar[slice] = ContextVar(
    "counted_rows", default=slice(None)
)  # rows that enter batch statistics here


@contextmanager
def counting(rows: slice) -> Iterator[None]:
    """Rows that this device has beside others, which count them, do not enter batch statistics a second time."""
    token = counted_rows.set(rows)
    try:
        yield
    finally:
        counted_rows.reset(token)


class _BatchNorm(torch.autograd.Function):
    """Batch normalisation with the statistics of the counted rows of all devices.

    x [B, C, h, w] -> y, and mean [C], variance (biased) [C] and the number of pixels [1] beside it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, mesh: DeviceMesh, rows: slice
    ) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        mine = x[:, :, rows]
        pixels = mine.numel() // mine.shape[1]
        var, here = torch.zeros(2, mine.shape[1], dtype=dtype, device=x.device)
        if pixels:  # centred: sums of squares would cancel where the mean is large
            var, here = var_mean(mine)
        *sums, n = _sum(torch.cat([pixels * here, here.new_tensor([pixels])]), mesh).split([len(here), 1])
        mean = sums[0] / n
        var = _sum(pixels * (var + (here - mean) ** 2), mesh) / n
        ctx.save_for_backward(x, weight, mean, var, n)
        ctx.eps, ctx.mesh, ctx.rows = eps, mesh, rows
        ctx.mark_non_differentiable(mean, var, n)
        ctx.set_materialize_grads(False)
        return F.batch_norm(x, mean, var, weight.to(dtype), bias.to(dtype), False, 0.0, eps), mean, var, n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, n = ctx.saved_tensors
        scale = weight.to(mean.dtype)
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(  # as if mean and var were constants
            dy, x, scale, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        if is_for_runs(x):
            dweight, dbias = gradients_of_affine(dy, x, mean, (var + ctx.eps).rsqrt())
        # dx = weight / std (dy - mean(dy) - x_hat mean(dy x_hat)), the first term is there, the others where counted
        dy_x_hat, dy_sum = (_sum(torch.cat([dweight, dbias]), ctx.mesh) / n).chunk(2)
        std = (var + ctx.eps).sqrt()
        slope = scale / std * dy_x_hat / std
        offset = scale / std * dy_sum - slope * mean
        offset, slope = (term.to(x.dtype).view(-1, 1, 1) for term in (offset, slope))
        dx[:, :, ctx.rows].sub_(offset).addcmul_(x[:, :, ctx.rows], slope, value=-1)
        return dx, dweight.to(weight.dtype), dbias.to(weight.dtype), None, None, None


def _sum(x: Tensor, mesh: DeviceMesh) -> Tensor:
    for dim in range(mesh.ndim):
        x = collectives.wait_tensor(collectives.all_reduce(x, "sum", (mesh, dim)))
    return x
