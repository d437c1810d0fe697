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
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from isa_triton import tiles
from isa_triton.backend.kernels import launch
from isa_triton.partition import Partition
from isa_triton.tiles import BackwardTiles, Entry, Tile

PASSES = {"forward": ("forward",), "backward": ("group", "queries", "keys", "dk", "dv", "pairs")}  # a kernel a step
STEPS = tuple(step for steps in PASSES.values() for step in steps)
FILED = {"dk": "keys", "dv": "values"}  # steps that `isa_triton.tiles.STEPS` calls otherwise
TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_V", "num_warps", "num_stages")  # a tile's fields, as kernels have them
NOT_SHIPPED = "not shipped"
GRID_LIMITS = 2**31 - 1, 2**16 - 1, 2**16 - 1  # of CUDA; HIP's are no lower
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}


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
    name: str = ""

    def __str__(self) -> str:
        (height, width), p = self.partition.size, self.partition
        kind = "dense" if p.groups == 1 else "local" if p.w.token_stride == p.h.token_stride == 1 else "interlaced"
        return (
            f"{kind}, {p.tokens} tokens, K = {self.key_width}, V = {self.value_width}, {self.heads} heads"
            f"{', bias' * self.bias}, {self.dtype}, {self.maps} maps of {height}x{width}"
        )

    @property
    def sizes(self) -> tuple[int, int, str, int]:
        """What `isa_triton.tiles` looks a tile up by: both widths, the dtype and the tokens of a group."""
        return self.key_width, self.value_width, self.dtype, self.partition.tokens

    @property
    def precision(self) -> str:
        """As the launchers and `tl.dot` name it."""
        return "tf32" if self.dtype == "tf32" else "ieee"

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize


class Launch(NamedTuple):
    """One launch of a kernel: everything that its binary depends on, the grid, and the integers that it is given.

    It travels between processes.
    """

    module: str
    name: str
    target: str
    problem: Problem
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
    def writes(self) -> set[str]:
        """Which of dk and dv it writes: an argument that is None is a constant."""
        at = {name: (i,) for i, name in enumerate(self.kernel.arg_names) if name in ("dk", "dv")}
        return {name for name, place in at.items() if self.constants.get(place, 0) is not None}

    @property
    def label(self) -> str:
        """The kernel, and what it writes where several launches of it share the work."""
        alone = f": {min(self.writes)}" if len(self.writes) == 1 else ""
        return self.name.removesuffix("_kernel") + alone

    @property
    def step(self) -> str:
        """Which of `STEPS` it is; "keys" writes dk and dv, and "forward" may keep a bias on chip."""
        pass_, _, step = self.name.removesuffix("_kernel").partition("_")
        return "forward" if pass_ == "forward" else min(self.writes) if len(self.writes) == 1 else step

    @property
    def tile(self) -> Tile:
        """The tile that it was given."""
        given = {self.kernel.arg_names[place[0]]: n for place, n in self.constants.items() if len(place) == 1}
        m, n, k, v = (given.get(name) or given["BLOCK"] for name in TILE[:4])
        return Tile(m, n, k, v, self.options["num_warps"], self.options["num_stages"])

    @property
    def origin(self) -> str:
        """Where its tile comes from."""
        entry, problem = shipped_entry(self.target, self.step, self.problem), self.problem
        if entry is None or entry.tile != self.tile:
            return NOT_SHIPPED
        made = entry.is_made_for(problem.key_width, problem.value_width, problem.partition.tokens)
        return "its own entry" if made else f"the entry of {entry}"

    @property
    def key(self) -> str:
        """A name for the binary: a hash of the kernel's source, the specialisation, the target and Triton's version."""
        options = {name: value for name, value in self.options.items() if name != "extern_libs"}  # paths of a machine
        binary = gpu_target(self.target), self.signature, self.constants, self.attributes, options, triton.__version__
        return hashlib.sha256(f"{self.kernel.cache_key} {binary}".encode()).hexdigest()[:32]


def shipped_entry(target: str, step: str, problem: Problem) -> Entry | None:
    """What is shipped for one of `STEPS` of a problem, if anything is."""
    try:
        return tiles.entry(target, FILED.get(step, step), *problem.sizes)
    except LookupError:
        return None


def named(tile: Tile) -> dict[str, int]:
    """A tile's fields as kernels name them."""
    return dict(zip(TILE, tile, strict=True))


def format_tile(tile: Tile) -> str:
    """As `--tiles` takes it: BLOCK_M=64,BLOCK_N=64,..."""
    return ",".join(f"{name}={n}" for name, n in named(tile).items())


def gpu_target(target: str) -> GPUTarget:
    """Triton's name of "sm_90" or "gfx942".

    Raises:
        ValueError: a name of neither form.
    """
    if target.startswith("sm_") and target[3:].isdecimal():
        return GPUTarget("cuda", int(target[3:]), 32)
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64 if target.startswith("gfx9") else 32)
    raise ValueError(f"a target is sm_NN or gfxNNN, got {target!r}")


class Tensors:
    """What the passes of a problem read and write, each made by `make` of a tensor without memory.

    q, k, dq, dk are [maps, H, W, heads, K], v, out, do, dv [..., V], lse and delta [maps, H, W, heads] in fp32, and the
    bias, if there is one, [heads, tokens, tokens].
    """

    def __init__(self, problem: Problem, make: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self.problem, self.scale = problem, problem.key_width**-0.5
        pixels, tokens = (problem.maps, *problem.partition.size, problem.heads), problem.partition.tokens

        def new(*shape: int, dtype: torch.dtype = DTYPES[problem.dtype]) -> Tensor:
            return make(torch.empty(shape, dtype=dtype, device="meta"))

        self.q, self.k, self.dq, self.dk = (new(*pixels, problem.key_width) for _ in range(4))
        self.v, self.out, self.do, self.dv = (new(*pixels, problem.value_width) for _ in range(4))
        self.lse, self.delta = (new(*pixels, dtype=torch.float32) for _ in range(2))
        self.bias = new(problem.heads, tokens, tokens) if problem.bias else None
        self.new = new

    def forward(self, tile: Tile, with_lse: bool = True) -> None:
        """Launch the forward pass."""
        lse = self.lse if with_lse else None
        launch.forward(
            self.q, self.k, self.v, self.bias, self.out, lse, self.scale, self.problem.partition, tile,
            self.problem.precision,
        )  # fmt: skip

    def partials(self, tiles: BackwardTiles) -> Tensor | None:
        """Where a backward pass with these tiles sums dbias, if there is a bias."""
        problem = self.problem
        shape = launch.bias_partials_shape(problem.maps, problem.heads, problem.partition, tiles)
        return self.new(*shape, dtype=torch.float32) if problem.bias else None

    def backward(self, tiles: BackwardTiles, partials: Tensor | None) -> None:
        """Launch the backward pass, without a gradient of lse."""
        problem = self.problem
        launch.backward(
            self.q, self.k, self.v, self.bias, self.out, self.lse, self.do, None, self.dq, self.dk, self.dv,
            self.delta, partials, self.scale, problem.partition, tiles, problem.precision,
        )  # fmt: skip


def forward_launches(target: str, problem: Problem, tile: Tile, with_lse: bool = False) -> list[Launch]:
    """The launch of the forward pass."""
    with _recording(target, problem) as launches:
        Tensors(problem).forward(tile, with_lse)
    return launches


def backward_launches(target: str, problem: Problem, tiles: BackwardTiles) -> list[Launch]:
    """The launches of the backward pass."""
    with _recording(target, problem) as launches:
        tensors = Tensors(problem)
        tensors.backward(tiles, tensors.partials(tiles))
    return launches


def pass_launches(target: str, problem: Problem, pass_: str, training: bool = False) -> list[Launch]:
    """What the run time would launch; in training a forward pass writes the lse that its backward pass needs."""
    backward = tiles.backward(target, *problem.sizes)
    if pass_ == "backward":
        return backward_launches(target, problem, backward)
    with_lse = training and not launch.in_one_kernel(backward, problem.partition)
    return forward_launches(target, problem, tiles.lookup(target, "forward", *problem.sizes), with_lse)


def compile_launch(launch: Launch, cache: Path) -> Any:
    """Triton's compiled kernel; `cache` is where Triton keeps what it compiled before."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    with knobs.cache.scope():
        knobs.cache.dir = str(cache)
        return triton.compile(source, target=gpu_target(launch.target), options=launch.options)


def use_driver(stub: Any = None) -> None:
    """Launch by a stub of a driver, or by that of this machine's GPU, and forget what was compiled for another."""
    driver.set_active(stub)
    for kernel in vars(launch).values():
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()


@contextmanager
def _recording(target: str, problem: Problem) -> Iterator[list[Launch]]:
    """Kernels launched inside are recorded instead, under a driver that knows the name of its device only."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    named = {"get_current_target": lambda: gpu_target(target), "get_current_device": lambda: 0}
    use_driver(SimpleNamespace(**named, get_current_stream=lambda device: 0))
    launches = list[Launch]()
    run, calls = JITFunction.run, list[tuple[tuple[int, ...], tuple[tuple[str, int], ...]]]()

    def run_without_launch(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> Any:
        if any(programs > limit for programs, limit in zip(grid, GRID_LIMITS, strict=False)):
            raise ValueError(f"{kernel.fn.__name__}: a grid of {grid} programs is beyond the limits {GRID_LIMITS}")
        calls.append((grid, tuple(_integers(zip(kernel.arg_names, args, strict=False)))))
        return run(kernel, *args, grid=grid, warmup=True, **kwargs)

    def record(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        options = {name: tuples(value) for name, value in options.items()}
        specialised = compile["signature"], compile["constants"], compile["configs"][0], options
        launches.append(Launch(fn.module, fn.name, target, problem, *specialised, *calls[-1]))
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


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value
