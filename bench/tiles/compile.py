"""Compiling without a GPU: the launches of a call, as the run time would make them, and their binaries.

Launches are planned for the layouts of tensors without memory, by the run time's own plan; compiling one gives the
binary that the run time would launch. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from isa_triton import tiles
from isa_triton.backend.kernels import launch, plan
from isa_triton.partition import Partition
from isa_triton.tiles import BackwardTiles, Entry, Tile

PASSES = {
    "forward": ("forward",),
    "backward": ("group", "columns", "queries", "keys", "dk", "dv", "pairs"),
}  # a kernel a step
STEPS = tuple(step for steps in PASSES.values() for step in steps)
FILED = {"dk": "keys", "dv": "values"}  # steps that `isa_triton.tiles.STEPS` calls otherwise
TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_V", "num_warps", "num_stages")  # a tile's fields, as kernels have them
NOT_SHIPPED = "not shipped"
GRID_LIMIT = 2**31 - 1  # of CUDA; HIP's is no lower
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
    cosine: bool = False  # whether scores are cosines; its tiles are those of any other

    def __str__(self) -> str:
        size = "x".join(map(str, self.partition.size))
        return (
            f"{self.kind}, {self.partition.tokens} tokens, K = {self.key_width}, V = {self.value_width}, "
            f"{self.heads} heads{', bias' * self.bias}{', cosines' * self.cosine}, {self.dtype}, "
            f"{self.maps} maps of {size}"
        )

    @property
    def kind(self) -> str:
        """ "dense", "local" or "interlaced"."""
        adjacent = all(axis.token_stride == 1 for axis in self.partition)
        return "dense" if self.partition.groups == 1 else "local" if adjacent else "interlaced"

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
    """One launch of a kernel for a problem on a target; it travels between processes, its kernel by name."""

    target: str
    problem: Problem
    module: str
    name: str
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    @classmethod
    def of(cls, planned: plan.Launch, target: str, problem: Problem) -> Launch:
        """A planned launch on a target.

        Raises:
            ValueError: its grid is beyond what devices take.
        """
        kernel, programs, arguments, options = planned
        module, name = kernel.fn.__module__, kernel.fn.__name__
        if programs > GRID_LIMIT:
            raise ValueError(f"{name}: a grid of {programs} programs is beyond {GRID_LIMIT}")
        return cls(target, problem, module, name, programs, arguments, options)

    @property
    def planned(self) -> plan.Launch:
        """What it is of."""
        kernel = getattr(import_module(self.module), self.name)
        return plan.Launch(kernel, self.programs, self.arguments, self.options)

    @property
    def integers(self) -> dict[str, int]:
        """The integers that it is given, "axes.0.size" for the size of the first of `axes`."""
        return dict(_integers(self.arguments.items()))

    @property
    def writes(self) -> set[str]:
        """Which of dk and dv it writes."""
        return {name for name in ("dk", "dv") if self.arguments.get(name) is not None}

    @property
    def keeps_bias(self) -> bool:
        """Whether a bias stays on chip from one group to the next."""
        return self.name == "forward_group_kernel"

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
        m, n, k, v = (self.arguments.get(name) or self.arguments["BLOCK"] for name in TILE[:4])
        return Tile(m, n, k, v, self.options["num_warps"], self.options["num_stages"])

    @property
    def choices(self) -> dict[str, Any]:
        """Its tile as kernels name it: what tables say first."""
        return named(self.tile)

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
        target = gpu_target(self.target)
        binary = target, *self.planned.specialised(target), self.options, triton.__version__
        return hashlib.sha256(f"{self.planned.kernel.cache_key} {binary}".encode()).hexdigest()[:32]


def shipped_entry(target: str, step: str, problem: Problem) -> Entry | None:
    """What is shipped for one of `STEPS` of a problem, if anything is."""
    try:
        return tiles.entry(target, FILED.get(step, step), *problem.sizes, problem.bias)
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
    bias, if there is one, [heads, tokens, tokens], or in whole rows where kernels read it again and again.
    """

    def __init__(self, problem: Problem, make: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        self.problem, self.scale = problem, problem.key_width**-0.5
        pixels, tokens = (problem.maps, *problem.partition.size, problem.heads), problem.partition.tokens

        def new(*shape: int, dtype: torch.dtype = DTYPES[problem.dtype]) -> Tensor:
            return make(torch.empty(shape, dtype=dtype, device="meta"))

        self.q, self.k, self.dq, self.dk = (new(*pixels, problem.key_width) for _ in range(4))
        self.v, self.out, self.do, self.dv = (new(*pixels, problem.value_width) for _ in range(4))
        self.lse, self.delta = (new(*pixels, dtype=torch.float32) for _ in range(2))
        whole = plan.whole_rows(tokens, DTYPES[problem.dtype].itemsize)
        self.biases = (new(problem.heads, whole, whole), new(problem.heads, tokens, tokens)) if problem.bias else None
        self.new = new

    def bias(self, kept: bool = False) -> Tensor | None:
        """The bias as the backend gives it to kernels, which keep it on chip or do not."""
        return None if self.biases is None else self.biases[kept]

    def of_forward(self, keeps_bias: bool, with_lse: bool = True) -> Any:
        """What a forward pass reads and writes, in the order of `plan.FORWARD`."""
        return self.q, self.k, self.v, self.bias(keeps_bias), *[None] * 4, self.out, self.lse if with_lse else None

    def forward(self, tile: Tile, with_lse: bool = True) -> None:
        """Launch the forward pass."""
        partition, precision = self.problem.partition, self.problem.precision
        q, k, v, bias, *_, out, lse = self.of_forward(plan.in_one_block(tile, partition), with_lse)
        launch.forward(q, k, v, bias, out, lse, self.scale, partition, tile, precision, cosine=self.problem.cosine)

    def partials(self, tiles: BackwardTiles) -> Tensor | None:
        """Where a backward pass with these tiles sums dbias, if there is a bias."""
        problem = self.problem
        shape = plan.bias_partials_shape(problem.maps, problem.heads, problem.partition, tiles)
        return self.new(*shape, dtype=torch.float32) if problem.bias else None

    def of_backward(self, partials: Tensor | None) -> Any:
        """What a backward pass reads and writes, without a gradient of lse, in the order of `plan.BACKWARD`."""
        saved, gradients = (self.out, self.lse, self.do, None), (self.dq, self.dk, self.dv, self.delta, partials)
        return self.q, self.k, self.v, self.bias(), *[None] * 4, *saved, *gradients

    def backward(self, tiles: BackwardTiles, partials: Tensor | None) -> None:
        """Launch the backward pass."""
        run: Any = launch.backward
        problem = self.problem
        q, k, v, bias, _, _, _, _, *rest = self.of_backward(partials)
        run(q, k, v, bias, *rest, self.scale, problem.partition, tiles, problem.precision, cosine=problem.cosine)


def forward_launches(target: str, problem: Problem, tile: Tile, with_lse: bool = False) -> list[Launch]:
    """The launch of the forward pass."""
    tensors, partition = Tensors(problem), problem.partition
    given = _layouts(tensors.of_forward(plan.in_one_block(tile, partition), with_lse))
    planned = plan.forward(given, tensors.scale, partition, tile, problem.precision, cosine=problem.cosine)
    return [Launch.of(each, target, problem) for each in planned]


def backward_launches(target: str, problem: Problem, tiles: BackwardTiles) -> list[Launch]:
    """The launches of the backward pass."""
    tensors = Tensors(problem)
    given = _layouts(tensors.of_backward(tensors.partials(tiles)))
    planned = plan.backward(given, tensors.scale, problem.partition, tiles, problem.precision, cosine=problem.cosine)
    return [Launch.of(each, target, problem) for each in planned]


def pass_launches(target: str, problem: Problem, pass_: str, training: bool = False) -> list[Launch]:
    """What the run time would launch; in training a forward pass writes the lse that its backward pass needs."""
    backward = tiles.backward(target, *problem.sizes, problem.bias)
    if pass_ == "backward":
        return backward_launches(target, problem, backward)
    with_lse = training and not plan.in_one_kernel(backward, problem.partition)
    return forward_launches(target, problem, tiles.lookup(target, "forward", *problem.sizes, problem.bias), with_lse)


def compile_launch(launched: Launch, cache: Path) -> Any:
    """Triton's compiled kernel; `cache` is where Triton keeps what it compiled before."""
    with knobs.cache.scope():
        knobs.cache.dir = str(cache)
        return launch.compile(launched.planned, gpu_target(launched.target))


def _layouts(tensors: Iterable[Tensor | None]) -> tuple[plan.Layout | None, ...]:
    """Of tensors without memory, which pass for aligned ones."""
    return tuple(None if x is None else plan.Layout(tuple(x.shape), x.stride(), x.dtype, True) for x in tensors)


def _integers(arguments: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, int]]:
    """The integers among a kernel's arguments and in its tuples."""
    for name, value in arguments:
        number = value.value if isinstance(value, tl.constexpr) else value
        if type(number) is int:
            yield name, number
        elif isinstance(value, tuple):
            yield from _integers(parts(name, value))


def parts(name: str, value: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Those of an argument that is a tuple, as "q.data", or "axes.0" where they have no names."""
    for field, part in zip(getattr(value, "_fields", range(len(value))), value, strict=True):
        yield f"{name}.{field}", part


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    return tuple(map(tuples, value)) if isinstance(value, list) else value
