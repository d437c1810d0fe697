"""``python -m bench overhead``: what one call costs the host, layer by layer, with the kernel's launch left out.

Every layer is called with the arguments that the layer above would pass it, and includes all layers below.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.jit import KernelInterface

from bench import terminal
from bench.arguments import add_device, add_out, add_rounds, positive
from bench.records import write
from bench.terminal import Bar, Table, Terminal
from isa_triton import Partition, ops, partitioned_attention, tiles
from isa_triton.backend import triton as triton_backend
from isa_triton.backend.contract import Call
from isa_triton.backend.kernels import launch

KERNELS = tuple(name for name, value in vars(launch).items() if isinstance(value, KernelInterface))
PARTITION, WIDTHS = Partition.interlaced((8, 16), stride=(2, 4)), (32, 64)  # of keys and values
CALL, TARGET = Call(0.1, PARTITION, with_lse=False, backend="triton"), triton_backend.INTERPRETED_TARGET
BARE, CHECKED, LEARNED = "bare Python call", "partitioned_attention: checks", "and its backward"
CALLS = {"forward": CHECKED, "training": LEARNED}  # the whole of each pass
Layers = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Row:
    """A line of the CSV: a call of a layer and all below it."""

    pass_: str
    layer: str
    microseconds: float
    above_bare: float  # than a Python function that does nothing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out(parser, "overhead.csv")
    add_rounds(parser, 100, "rounds, over which medians are taken")
    parser.add_argument("--calls", type=positive, default=100, metavar="N", help="of a layer in a round")
    add_device(parser)
    terminal.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    said, path, rows = Terminal(args), args.out / "overhead.csv", list[Row]()
    said.say(f"Every layer is a row of {path}")
    with _stubbed(args.device), said.progress("rounds", 2 * (1 + args.rounds)) as bar:
        passes = {"forward": forward(args.device), "training": training(args.device)}
        medians = {name: microseconds(layers, args.rounds, args.calls, bar) for name, layers in passes.items()}
    for name, times in medians.items():
        rows += [Row(name, layer, round(us, 3), round(us - times[BARE], 3)) for layer, us in times.items()]
    write(path, Row, rows)
    lines = [(row.pass_, row.layer, f"{row.microseconds:.2f}", f"{row.above_bare:.2f}") for row in rows]
    title = f"Microseconds a call, {args.device}, medians of {args.rounds}"
    said.show(Table(title, ("pass", "layer", "us", "above a bare call"), lines, words=2))
    calls = " and ".join(f"{medians[name][call]:.0f} us" for name, call in CALLS.items())
    said.end(f"A call costs the host {calls} with its backward, the kernel's launch left out.", path)


def forward(device: str) -> Layers:
    """The layers of a call without gradients, the innermost first."""
    q, k, v = _arguments(device)
    out, tile = torch.empty_like(v), tiles.lookup(TARGET, "forward", *WIDTHS, "float32", PARTITION.tokens)
    return {
        BARE: lambda: _bare(q, k, v, PARTITION, backend="triton"),
        "launcher": lambda: launch.forward(q, k, v, None, out, None, CALL.scale, PARTITION, tile),
        "backend: outputs, tile, device": lambda: triton_backend.forward(q, k, v, None, CALL),
        "operator: dispatch": lambda: torch.ops.isa_triton.forward.default(q, k, v, None, *CALL.flat()),
        "ops.attention: autograd": lambda: ops.attention(q, k, v, None, CALL),
        CHECKED: lambda: partitioned_attention(q, k, v, PARTITION, backend="triton"),
    }


def training(device: str) -> Layers:
    """The layers of a call with gradients: those of backward, and forward and backward together."""
    q, k, v = _arguments(device)
    leaves = a, b, c = tuple(x.clone().requires_grad_() for x in (q, k, v))
    do, dq, dk, dv = (torch.ones_like(x) for x in (v, q, k, v))
    chosen = tiles.backward(TARGET, *WIDTHS, "float32", PARTITION.tokens)
    assert launch.in_one_kernel(chosen, PARTITION)
    given, wanted = (q, k, v, None, None, None, do, None), (dq, dk, dv, None, None)

    def attend() -> Any:
        return partitioned_attention(a, b, c, PARTITION, backend="triton")

    return {
        BARE: lambda: _bare(q, k, v, do),
        "launcher": lambda: launch.backward(*given, *wanted, CALL.scale, PARTITION, chosen),
        "backend: gradients, tiles, device": lambda: triton_backend.backward(*given, CALL),
        "operator: dispatch": lambda: torch.ops.isa_triton.backward.default(*given, *CALL.flat()),
        "partitioned_attention, recorded": attend,
        LEARNED: lambda: torch.autograd.grad(attend(), leaves, do),
        "torch's own multiplication and its backward": lambda: torch.autograd.grad(c * 2.0, c, do),
    }


def microseconds(layers: Layers, rounds: int, calls: int, bar: Bar) -> dict[str, float]:
    """Median microseconds of CPU time a call of each, over interleaved rounds of many calls.

    CPU time, not time of day: what else runs on the machine is nobody's overhead.
    """
    samples: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(1 + rounds):
        for name, call in layers.items():
            begin = time.process_time()
            for _ in range(calls):
                call()
            samples[name].append((time.process_time() - begin) / calls * 1e6)
        bar.advance()
    return {name: statistics.median(times[1:]) for name, times in samples.items()}  # without the warm-up


def _arguments(device: str) -> tuple[torch.Tensor, ...]:
    """q, k and v."""
    return tuple(torch.ones(1, *PARTITION.size, 1, width, device=device) for width in (WIDTHS[0], *WIDTHS))


def _bare(q: Any, k: Any, v: Any, other: Any, backend: Any = None) -> Any:
    return other


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
