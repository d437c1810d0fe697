"""``python -m bench.certify.attend DEVICE DTYPE SHAPE PASS MAPS``: one call, for tools that watch a process.

A first call compiles and is not watched by tools that wait for the profiler to start; the second one is.
"""

from __future__ import annotations

import sys

import torch

from bench.certify import problems
from bench.certify.rows import Setting


def main(device: str, dtype: str, shape: str, pass_: str, maps: str) -> None:
    problem = problems.problem(Setting(device, (shape,), 1, ""), shape, dtype, int(maps))
    tensors, module = problems.Tensors.of(problem, device, grad=pass_ == "training"), torch.get_device_module(device)
    call = problems.learn if pass_ == "training" else problems.attend
    call(problem, tensors)
    module.synchronize()
    runtime = module.cudart()
    runtime.cudaProfilerStart()
    call(problem, tensors)
    module.synchronize()
    runtime.cudaProfilerStop()


if __name__ == "__main__":
    main(*sys.argv[1:])
