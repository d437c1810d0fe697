"""Batch normalisation whose statistics are accurate on channels_last maps of a CPU too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._tracing import has_modes, is_differentiated_forward, leaf_of_fx, wants_torch_operators

MANY = 256  # pixels of a channel: the sum of fewer, one after the other, is within some roundings


def as_map(x: Tensor) -> Tensor:
    """A line [B, C, L] or a volume [B, C, D, H, W] as a map of the same pixels, a view; a map as it is.

    It is made with the channels last, or PyTorch invents a stride for a batch of one, by which its operators take the
    map for one of another layout, and copy it there and back.
    """
    if x.dim() == 5:
        return x.permute(0, 2, 3, 4, 1).flatten(1, 2).permute(0, 3, 1, 2)
    return x.unsqueeze(2) if x.dim() == 3 else x


def from_map(y: Tensor, size: Sequence[int]) -> Tensor:
    """The inverse of `as_map`, for lines, maps or volumes of this size."""
    if len(size) == 3:
        return y.permute(0, 2, 3, 1).unflatten(1, tuple(size[:2])).permute(0, 4, 1, 2, 3)
    return y.squeeze(2) if len(size) == 1 else y


class _BatchNormOfRuns(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of lines, maps or volumes, all of which are maps for it."""

    @leaf_of_fx
    def forward(self, x: Tensor) -> Tensor:
        if not self._sums_in_runs(x):
            if x.dim() == 3 and not self.training and self.running_mean is not None:  # torch keeps no layout of lines
                moments = self.running_mean, self.running_var
                return from_map(F.batch_norm(as_map(x), *moments, self.weight, self.bias, eps=self.eps), x.shape[2:])
            return super().forward(x)
        y, mean, var = _BatchNorm.apply(x, self.weight, self.bias, self.eps)
        if self.training and self.track_running_stats and self.running_mean is not None:
            self._remember(mean, var, x.numel() // x.shape[1])
        return y

    def _sums_in_runs(self, x: Tensor) -> bool:
        if torch.compiler.is_compiling() or wants_torch_operators() or type(x) not in (Tensor, nn.Parameter):
            return False
        if not (self.training or self.running_mean is None) or has_modes() or is_differentiated_forward():
            return False
        fp32 = all(t is None or t.dtype == torch.float32 for t in (self.weight, self.running_mean))
        return fp32 and 3 <= x.dim() <= 5 and x.shape[1] == self.num_features and is_for_runs(as_map(x))

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor, pixels: int) -> None:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        for running, value in ((self.running_mean, mean), (self.running_var, var * (pixels / (pixels - 1)))):
            assert running is not None
            running.lerp_(value, factor)


class BatchNorm1d(_BatchNormOfRuns, nn.BatchNorm1d):
    """`BatchNorm2d` of lines [B, C, L].

    Examples:
        >>> BatchNorm1d(8)(torch.randn(2, 8, 60)).shape
        torch.Size([2, 8, 60])
    """


class BatchNorm3d(_BatchNormOfRuns, nn.BatchNorm3d):
    """`BatchNorm2d` of volumes [B, C, D, H, W].

    Examples:
        >>> BatchNorm3d(8)(torch.randn(2, 8, 6, 10, 4)).shape
        torch.Size([2, 8, 6, 10, 4])
    """


class BatchNorm2d(_BatchNormOfRuns, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, the default of our layers, as accurate on channels_last maps of a CPU as on others.

    There PyTorch (2.14) adds up a channel's pixels one after the other in fp32, and mean, variance and gradients lose
    a digit or two, which later layers amplify. Here pixels are added up in runs, and then the runs. Elsewhere
    (evaluation, GPUs, other dtypes and layouts, small maps, compiled graphs, transforms) it is PyTorch's own.

    Examples:
        >>> x = torch.randn(2, 8, 6, 10).to(memory_format=torch.channels_last)
        >>> bool(BatchNorm2d(8)(x).mean((0, 2, 3)).abs().max() < 1e-6)
        True
    """


BATCH_NORMS: dict[int, type[nn.Module]] = {1: BatchNorm1d, 2: BatchNorm2d, 3: BatchNorm3d}  # by the axes of a map


class _BatchNorm(torch.autograd.Function):
    """x [B, C, H, W] channels_last -> y, and the mean and the biased variance [C] of its pixels; x may be no map.

    Views of it are within: autograd copies a view, its base and the gradients of both where an activation writes to it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
        pixels = as_map(x)
        var, mean = var_mean(pixels)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt_())
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        y = F.batch_norm(pixels, mean, var, weight, bias, False, 0.0, eps)
        return from_map(y, x.shape[2:]).detach(), mean, var

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        needed, size = [*ctx.needs_input_grad[:3]], x.shape[2:]
        x, dy = as_map(x), as_map(dy).contiguous(memory_format=torch.channels_last)
        native = torch.ops.aten.native_batch_norm_backward
        if torch.is_grad_enabled():  # PyTorch knows its derivative
            dx, *of_affine = native(dy, x, weight, None, None, mean, invstd, True, ctx.eps, needed)
            return from_map(dx, size), *of_affine, None
        dx = dweight = dbias = None
        if needed[0]:
            dx, *_ = native(dy, x, weight, None, None, mean, invstd, True, ctx.eps, [True, False, False])
            dx = from_map(dx, size)
        if needed[1] or needed[2]:
            dweight, dbias = gradients_of_affine(dy, x, mean, invstd)
        return dx, dweight if needed[1] else None, dbias if needed[2] else None, None


def is_for_runs(x: Tensor) -> bool:
    """Whether the pixels of a map x [B, C, H, W] are added up in runs: fp32, channels_last on a CPU, and many."""
    if not x.is_cpu or x.dtype != torch.float32 or x.numel() < MANY * x.shape[1] or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last)


def var_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variance and mean [C] of the pixels of x [B, C, H, W]; for `is_for_runs` a tenth of torch's own time."""
    if not is_for_runs(x):
        return torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 2, 3), correction=0)
    runs, C = _runs(x), x.shape[1]
    means, variances = torch.batch_norm_update_stats(_in_runs(x, runs), None, None, 0.0)
    between, mean = torch.var_mean(means.view(runs, C), 0, correction=0)
    return variances.view(runs, C).mean(0).add_(between), mean


def gradients_of_affine(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients [C] of weight and bias, from dy and x [B, C, H, W] and their statistics [C]."""
    runs = _runs(x) if is_for_runs(x) else 1
    pairs = (_in_runs(t, runs) for t in (dy, x)) if runs > 1 else (dy, x)
    statistics = (s.repeat(runs) for s in (mean, invstd))
    _, *sums = torch.ops.aten.native_batch_norm_backward(
        *pairs, None, None, None, *statistics, True, 0.0, [False, True, True]
    )
    dweight, dbias = (s.view(runs, -1).sum(0) for s in sums)
    return dweight, dbias


def _runs(x: Tensor) -> int:
    """Into how many runs the pixels of x [B, C, H, W] are divided: of at most as many pixels; of one, if prime."""
    pixels = x.numel() // x.shape[1]
    return pixels // next(run for run in range(math.isqrt(pixels), 0, -1) if pixels % run == 0)


def _in_runs(x: Tensor, runs: int) -> Tensor:
    """x [B, C, H, W], channels_last, seen as one map [1, runs C, pixels of a run, 1]: every so many-th is of a run."""
    return x.permute(0, 2, 3, 1).reshape(-1, runs * x.shape[1]).t()[None, :, :, None]
