"""``python -m bench overhead``: what one call costs the host, layer by layer, with the kernel's launch left out.

Every layer is called with the arguments that the layer above would pass it, and includes all layers below.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.jit import KernelInterface

from bench.arguments import add_out, device, positive
from bench.records import console, table, write
from isa_triton import Partition, ops, partitioned_attention, tiles
from isa_triton.backend import triton as triton_backend
from isa_triton.backend.contract import Call
from isa_triton.backend.kernels import launch

KERNELS = tuple(name for name, value in vars(launch).items() if isinstance(value, KernelInterface))
Layers = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """A line of the CSV: a call of a layer and all below it."""

    pass_: str
    layer: str
    microseconds: float
    above_bare: float  # than a Python function that does nothing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_out(parser, "overhead.csv")
    add("--rounds", type=positive, default=100, help="medians are taken over so many (default: 100)")
    add("--calls", type=positive, default=100, help="calls of a layer in a round (default: 100)")
    add("--device", type=device, default="cpu", help="of the tensors (default: cpu)")


def run(args: argparse.Namespace) -> None:
    with _stubbed(args.device):
        passes = {name: layers(args.device) for name, layers in (("forward", forward), ("training", training))}
        medians = {name: microseconds(layers, args.rounds, args.calls) for name, layers in passes.items()}
    terminal, path = console(), args.out / "overhead.csv"
    rows = [
        Row(name, layer, round(us, 3), round(us - times["bare Python call"], 3))
        for name, times in medians.items()
        for layer, us in times.items()
    ]
    for name in medians:
        lines = [(r.layer, f"{r.microseconds:.2f}", f"{r.above_bare:.2f}") for r in rows if r.pass_ == name]
        title = f"{name}, {args.device}, medians of {args.rounds}"
        terminal.print(table(title, ("layer", "us", "above a bare call"), lines))
    write(path, Row, rows)
    terminal.print(f"Wrote {path}")


def forward(device: str) -> Layers:
    """The layers of a call without gradients, the innermost first."""
    q, k, v, partition, scale = _arguments(device)
    tile = tiles.lookup(
        triton_backend.INTERPRETED_TARGET, "forward", q.shape[-1], v.shape[-1], "float32", partition.tokens
    )
    out, call = torch.empty_like(v), Call(scale, partition, with_lse=False, backend="triton")

    def bare(q: Any, k: Any, v: Any, partition: Any, backend: Any = None) -> Any:
        return v

    return {
        "bare Python call": lambda: bare(q, k, v, partition, backend="triton"),
        "launcher": lambda: launch.forward(q, k, v, None, out, None, scale, partition, tile),
        "backend: outputs, tile, device": lambda: triton_backend.forward(q, k, v, None, call),
        "operator: dispatch": lambda: torch.ops.isa_triton.forward.default(q, k, v, None, *call.flat()),
        "ops.attention: autograd": lambda: ops.attention(q, k, v, None, call),
        "partitioned_attention: checks": lambda: partitioned_attention(q, k, v, partition, backend="triton"),
    }


def training(device: str) -> Layers:
    """The layers of a call with gradients: those of backward, and forward and backward together."""
    q, k, v, partition, scale = _arguments(device)
    leaves = a, b, c = tuple(x.requires_grad_() for x in (q.clone(), k.clone(), v.clone()))
    do, call = torch.ones_like(v), Call(scale, partition, with_lse=False, backend="triton")
    chosen = tiles.backward(triton_backend.INTERPRETED_TARGET, q.shape[-1], v.shape[-1], "float32", partition.tokens)
    assert launch.in_one_kernel(chosen, partition)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))

    def bare(q: Any, k: Any, v: Any, do: Any) -> Any:
        return do

    def attend() -> Any:
        return partitioned_attention(a, b, c, partition, backend="triton")

    return {
        "bare Python call": lambda: bare(q, k, v, do),
        "launcher": lambda: launch.backward(
            q, k, v, None, None, None, do, None, dq, dk, dv, None, None, scale, partition, chosen
        ),
        "backend: gradients, tiles, device": lambda: triton_backend.backward(q, k, v, None, None, None, do, None, call),
        "operator: dispatch": lambda: torch.ops.isa_triton.backward.default(
            q, k, v, None, None, None, do, None, *call.flat()
        ),
        "partitioned_attention, recorded": attend,
        "and its backward": lambda: torch.autograd.grad(attend(), leaves, do),
        "torch's own multiplication and its backward": lambda: torch.autograd.grad(c * 2.0, c, do),
    }


def microseconds(layers: Mapping[str, Callable[[], Any]], rounds: int, calls: int) -> dict[str, float]:
    """Median microseconds of CPU time a call of each, over interleaved rounds of many calls.

    CPU time, not time of day: what else runs on the machine is nobody's overhead.
    """
    samples: dict[str, list[float]] = {name: [] for name in layers}
    for warm_up in (True, *[False] * rounds):
        for name, call in layers.items():
            begin = time.process_time()
            for _ in range(calls):
                call()
            if not warm_up:
                samples[name].append((time.process_time() - begin) / calls * 1e6)
    return {name: statistics.median(times) for name, times in samples.items()}


def _arguments(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Partition, float]:
    partition = Partition.interlaced((8, 16), stride=(2, 4))
    q, k, v = (torch.ones(1, *partition.size, 1, width, device=device) for width in (32, 32, 64))
    return q, k, v, partition, 0.1


class _NoKernel:
    """A kernel whose launch does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def _stubbed(device: str) -> Iterator[None]:
    """Kernels do nothing; the CPU passes for a device that they run on."""
    interpreted = {} if device != "cpu" else {"TRITON_INTERPRET": "1"}
    stubs: Any = dict.fromkeys(KERNELS, _NoKernel())
    with patch.multiple(launch, **stubs), patch.dict(os.environ, interpreted):
        yield
