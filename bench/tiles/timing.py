"""Timing one kernel of a pass on the GPU of this machine, by its own events."""

from __future__ import annotations

from collections.abc import Set
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from bench import measure
from bench.tiles.compile import Problem, forget_target
from isa_triton.backend.kernels import launch
from isa_triton.tiles import BackwardTiles, Tile

ROUNDS = 50


def kernel_seconds(problem: Problem, forward: Tile, backward: BackwardTiles, name: str, writes: Set[str]) -> float:
    """Median seconds of the kernel `name`.

    Args:
        problem: tensors of normal numbers are made for it.
        forward: the tile of the forward pass, which also fills what backward needs.
        backward: the tiles of the backward kernels.
        name: of the kernel that is timed.
        writes: which of dk and dv it writes, where several kernels have the name; else empty.
    """
    driver.reset_active()  # a stub may have been at work
    forget_target()

    def normal(x: Tensor) -> Tensor:
        return torch.randn(x.shape, device="cuda", dtype=x.dtype)

    *qkv, table = problem.inputs()
    (q, k, v), bias = map(normal, qkv), None if table is None else normal(table)
    do, out, dq, dk, dv = map(normal, (v, v, q, k, v))
    lse, delta = (q.new_empty(q.shape[:4], dtype=torch.float32) for _ in range(2))
    shape = launch.bias_partials_shape(problem.maps, problem.heads, problem.partition, backward)
    partials = None if bias is None else lse.new_empty(shape)
    scale, partition, precision = problem.key_width**-0.5, problem.partition, problem.precision

    def run_forward() -> None:
        launch.forward(q, k, v, bias, out, lse, scale, partition, forward, precision)

    def run_backward() -> None:
        launch.backward(
            q, k, v, bias, out, lse, do, None, dq, dk, dv, delta, partials, scale, partition, backward, precision
        )  # fmt: skip

    run, wanted = JITFunction.run, writes or None

    def run_only(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        given = {argument for argument, value in zip(kernel.arg_names, args, strict=False) if value is not None}
        if kernel.fn.__name__ == name and wanted in (None, given & {"dk", "dv"}):
            return run(kernel, *args, **kwargs)
        return None

    run_forward()
    run_backward()  # lse and delta are what they should be
    call = run_forward if name == "forward_kernel" else run_backward
    with patch.object(JITFunction, "run", run_only):
        return measure.seconds({name: lambda: call() or ()}, rounds=ROUNDS, device="cuda")[name]
