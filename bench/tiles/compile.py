"""Compiling without a GPU: the launches of a call, as the run time would make them, and their binaries.

A launcher runs on tensors without memory under a driver that only names a target, and every kernel it launches is
recorded with Triton's own specialisation: which strides are 1, which integers and pointers 16 divides. Compiling such a
record gives the binary that the run time would launch. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from isa_triton.backend.kernels import launch
from isa_triton.partition import Partition
from isa_triton.tiles import BackwardTiles, Tile

GRID_LIMITS = 2**31 - 1, 2**16 - 1, 2**16 - 1  # of CUDA; HIP's are no lower
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "tf32": torch.float32}


@dataclass(frozen=True)
class Problem:
    """One attention on maps of `partition.size`, as layers make it: contiguous [maps, H, W, heads, width] tensors.

    `dtype` is as `isa_triton.tiles` names it: "tf32" is fp32 in memory.
    """

    partition: Partition
    key_width: int
    value_width: int
    heads: int = 1
    bias: bool = False
    dtype: str = "bfloat16"
    maps: int = 2

    @property
    def precision(self) -> str:
        """As the launchers and `tl.dot` name it."""
        return "tf32" if self.dtype == "tf32" else "ieee"

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    def empty(self, *width: int, dtype: torch.dtype | None = None) -> Tensor:
        """A [maps, H, W, heads, *width] tensor without memory."""
        shape = (self.maps, *self.partition.size, self.heads, *width)
        return torch.empty(shape, dtype=dtype or DTYPES[self.dtype], device="meta")

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v and bias."""
        tokens, bias = self.partition.tokens, None
        if self.bias:
            bias = torch.empty(self.heads, tokens, tokens, dtype=DTYPES[self.dtype], device="meta")
        return self.empty(self.key_width), self.empty(self.key_width), self.empty(self.value_width), bias


class Launch(NamedTuple):
    """One launch of a kernel: everything that its binary depends on, the grid, and the integers that it is given.

    It travels between processes.
    """

    module: str
    name: str
    target: GPUTarget
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    grid: tuple[int, ...]
    integers: tuple[tuple[str, int], ...] = ()  # with the names of arguments, "h.size" for the size of `h`

    @property
    def kernel(self) -> Any:
        return getattr(import_module(self.module), self.name)

    @property
    def key(self) -> str:
        """A name for the binary: a hash of the kernel's source, the specialisation, the target and Triton's version."""
        options = {name: value for name, value in self.options.items() if name != "extern_libs"}  # paths of a machine
        binary = self.target, self.signature, self.constants, self.attributes, options, triton.__version__
        return hashlib.sha256(f"{self.kernel.cache_key} {binary}".encode()).hexdigest()[:32]


def gpu(target: str) -> GPUTarget:
    """Triton's name of "sm_90" or "gfx942".

    Raises:
        ValueError: a name of neither form.
    """
    if target.startswith("sm_") and target[3:].isdecimal():
        return GPUTarget("cuda", int(target[3:]), 32)
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    raise ValueError(f"a target is sm_NN or gfxNNN, got {target!r}")


def forward_launches(target: str, problem: Problem, tile: Tile, with_lse: bool = False) -> list[Launch]:
    """The launch of the forward pass."""
    q, k, v, bias = problem.inputs()
    lse = problem.empty(dtype=torch.float32) if with_lse else None
    scale = problem.key_width**-0.5
    with _recording(target) as launches:
        launch.forward(q, k, v, bias, torch.empty_like(v), lse, scale, problem.partition, tile, problem.precision)
    return launches


def backward_launches(target: str, problem: Problem, tiles: BackwardTiles) -> list[Launch]:
    """The launches of the backward pass, without a gradient of lse."""
    q, k, v, bias = problem.inputs()
    do, dq, dk, dv = (torch.empty_like(x) for x in (v, q, k, v))
    out: Tensor | None = torch.empty_like(v)
    lse: Tensor | None = problem.empty(dtype=torch.float32)
    delta: Tensor | None = problem.empty(dtype=torch.float32)
    scale, partials = problem.key_width**-0.5, None
    if bias is not None:
        shape = launch.bias_partials_shape(problem.maps, problem.heads, problem.partition, tiles)
        partials = torch.empty(shape, device="meta")
    if launch.in_one_kernel(tiles, problem.partition):
        out = lse = delta = None
    with _recording(target) as launches:
        launch.backward(
            q, k, v, bias, out, lse, do, None, dq, dk, dv, delta, partials, scale, problem.partition, tiles,
            problem.precision,
        )  # fmt: skip
    return launches


def compile_launch(launch: Launch, cache: Path) -> Any:
    """Triton's compiled kernel; `cache` is where Triton keeps what it compiled before."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    with knobs.cache.scope():
        knobs.cache.dir = str(cache)
        return triton.compile(source, target=launch.target, options=launch.options)


class StubDriver(DriverBase):
    """A driver of no device: it names the target and calls `launched` with the grid where it should launch."""

    def __init__(self, target: GPUTarget, launched: Callable[..., None] = lambda *grid: None) -> None:
        super().__init__()
        self.target = target
        self.utils = self
        self.launcher_cls = lambda source, metadata: lambda x, y, z, *_: launched(x, y, z)

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}

    def load_binary(self, *_: Any) -> tuple[Any, ...]:
        return None, None, 0, 0, 1024  # module, function, registers, spills, most threads

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> NoReturn:
        raise RuntimeError("a stub driver times nothing")


def activate(target: GPUTarget) -> None:
    """Make a stub driver for `target` the one of this process."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    driver.set_active(StubDriver(target))
    forget_target()


def forget_target() -> None:
    """Let the kernels forget for which target they were compiled last."""
    for kernel in vars(launch).values():
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()


@contextmanager
def _recording(target: str) -> Iterator[list[Launch]]:
    """Kernels launched inside are recorded instead."""
    activate(gpu(target))
    launches: list[Launch] = []
    run, calls = JITFunction.run, list[tuple[tuple[int, ...], tuple[tuple[str, int], ...]]]()

    def run_without_launch(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        if any(programs > limit for programs, limit in zip(grid, GRID_LIMITS, strict=False)):
            raise ValueError(f"{kernel.fn.__name__}: a grid of {grid} programs is beyond the limits {GRID_LIMITS}")
        calls.append((grid, tuple(_integers(zip(kernel.arg_names, args, strict=False)))))
        return run(kernel, *args, grid=grid, warmup=True, **kwargs)

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        launches.append(
            Launch(
                fn.module,
                fn.name,
                gpu(target),
                compile["signature"],
                compile["constants"],
                compile["configs"][0],
                {name: _hashable(value) for name, value in options.items()},
                *calls[-1],
            )
        )
        return True  # do not compile

    with patch.object(JITFunction, "run", run_without_launch), knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = record
        yield launches


def _integers(arguments: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, int]]:
    """The integers among a kernel's arguments and in its named tuples."""
    for name, value in arguments:
        if isinstance(value, int):
            yield name, value
        elif isinstance(value, tuple) and (fields := getattr(value, "_fields", None)):
            yield from _integers((f"{name}.{field}", part) for field, part in zip(fields, value, strict=True))


def _hashable(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
