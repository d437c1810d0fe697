"""The steps of a pass and their tiles: what may fit by arithmetic, what is shipped, and a tile's neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.jit import JITFunction

from bench import measure
from bench.tiles.binaries import LIMITS
from bench.tiles.compile import Launch, Problem, Tensors, backward_launches, forward_launches, gpu_target, use_driver
from bench.tiles.roofline import Machine
from isa_triton import tiles
from isa_triton.backend.kernels.launch import padded
from isa_triton.tiles import ARITHMETIC, BackwardTiles, Tile

KERNELS = {  # as `Launch.label` says
    "forward": "forward",  # or "forward_group", where a bias is shared by groups of one block
    "group": "backward_group",
    "queries": "backward_queries",
    "keys": "backward_keys",  # dk and dv
    "dk": "backward_keys: dk",
    "dv": "backward_keys: dv",
    "pairs": "backward_pairs",
}
FILED = {"dk": "keys", "dv": "values"}  # how `isa_triton.tiles.STEPS` calls them
PASSES = {"forward": ("forward",), "backward": ("group", "queries", "keys", "dk", "dv", "pairs")}
LARGEST = {"block_m": 256, "block_n": 256, "block_k": 512, "block_v": 512, "num_warps": 16, "num_stages": 5}
ROUNDS = 50  # of a measurement
FMA_PRODUCTS = 4096  # of a thread at once, without matrix units: with more a compiler takes minutes


@dataclass(frozen=True)
class Task:
    """A kernel that wants a tile: a key of `KERNELS`, for a problem on a GPU."""

    gpu: Machine
    problem: Problem
    step: str

    def launch(self, tile: Tile) -> Launch | None:
        """The launch with this tile, or None where the kernel does not serve the problem so."""
        if self.step == "forward":
            return forward_launches(self.gpu.target, self.problem, tile)[0]
        launches = backward_launches(self.gpu.target, self.problem, self.backward(tile))
        return next((launch for launch in launches if launch.label == KERNELS[self.step]), None)

    def backward(self, tile: Tile) -> BackwardTiles:
        """Tiles with which the backward pass has this step, with this tile."""
        group, values = tile if self.step == "group" else None, tile if self.step in ("dk", "dv") else None
        return BackwardTiles(group, queries=tile, keys=tile, values=values, pairs=tile)

    def seconds(self, tile: Tile) -> float:
        """Median seconds on the GPU of this machine, for a tile that serves the problem, on normal numbers."""
        launch = self.launch(tile)
        assert launch is not None
        use_driver()
        tensors = Tensors(self.problem, lambda x: torch.randn(x.shape, device="cuda", dtype=x.dtype))
        if self.step == "forward":
            call = partial(tensors.forward, tile)
        else:
            tensors.forward(
                tiles.lookup(self.gpu.target, "forward", *self.problem.sizes)
            )  # out and lse are what they are
            call = partial(tensors.backward, self.backward(tile), tensors.partials(self.backward(tile)))
        call()  # and so is delta
        run = JITFunction.run

        def run_one(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            given = {name for name, value in zip(kernel.arg_names, args, strict=False) if value is not None}
            if kernel.fn.__name__ == launch.name and given & {"dk", "dv"} == launch.writes:
                return run(kernel, *args, **kwargs)
            return None

        with patch.object(JITFunction, "run", run_one):
            return measure.seconds({"kernel": lambda: call() or ()}, rounds=ROUNDS, device="cuda")["kernel"]

    def shipped(self) -> list[Tile]:
        """The tile that is shipped for this problem, if one is, and those for others as far as they may fit here."""
        step, arithmetic = FILED.get(self.step, self.step), ARITHMETIC[self.problem.dtype]
        try:
            found = [tiles.lookup(self.gpu.target, step, *self.problem.sizes)]
        except LookupError:
            found = []
        others = (
            Tile(*entry["tile"])
            for entry in tiles._entries(self.gpu.target)
            if (entry["step"], entry["arithmetic"]) == (step, arithmetic) and entry["tile"] is not None
        )
        found += filter(self.may_fit, map(self.clipped, others))
        return list(dict.fromkeys(map(self.clipped, found)))

    def clipped(self, tile: Tile) -> Tile:
        """The tile without blocks that are larger than what they cut."""
        problem = self.problem
        tokens, key, value = map(padded, (problem.partition.tokens, problem.key_width, problem.value_width))
        m, n = (tokens, tokens) if self.step == "group" else (min(tile.block_m, tokens), min(tile.block_n, tokens))
        return Tile(m, n, min(tile.block_k, key), min(tile.block_v, value), tile.num_warps, tile.num_stages)

    def neighbours(self, tile: Tile) -> Iterator[Tile]:
        """Tiles that differ from one in one field, and may fit."""
        for field, largest in LARGEST.items():
            value = getattr(tile, field)
            changes = (value - 1, value + 1) if field == "num_stages" else (value // 2, value * 2)
            smallest = 16 if field.startswith("block") else 1
            for change in changes:
                other = tile._replace(**{field: change})
                if smallest <= change <= largest and self.clipped(other) == other and self.may_fit(other):
                    yield other

    def may_fit(self, tile: Tile) -> bool:
        """Whether what a program keeps in registers, and a stage of what it loads, could fit on a multiprocessor."""
        problem, target, limits = self.problem, self.gpu.target, LIMITS[self.gpu.target]
        m, n, k, v, warps, stages = tile
        tokens, of_scores = problem.partition.tokens, 3 * m * n // 2  # where a block has all keys or queries of a group
        key, value = padded(problem.key_width), padded(problem.value_width)
        held = {  # fp32 numbers: sums, and scores or what becomes of them
            "forward": m * (n + v),
            "group": 2 * m * n,
            "queries": of_scores if tokens <= n else m * (n + key),
            "keys": of_scores if tokens <= m else n * (m + key + value),
            "dk": of_scores if tokens <= m else n * (m + key),
            "dv": m * n if tokens <= m else n * (m + value),
            "pairs": 2 * m * n,
        }[self.step]
        threads, amd = warps * gpu_target(target).warp_size, target.startswith("gfx")
        per_thread = 448 if amd else 224  # of 512 and 255 registers: a few are for the rest
        chunk = problem.itemsize * max((m + n) * k, n * v if self.step == "forward" else (m + n) * v)
        matrix = problem.precision == "tf32" or problem.itemsize == 2 or amd
        return (
            (held <= threads * per_thread or limits.tensor_columns > 0)
            and chunk * max(1, stages - 1) <= limits.shared_of_program
            and (matrix or m * n * max(k, v) <= threads * FMA_PRODUCTS)
        )
