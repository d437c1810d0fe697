"""``python -m bench overhead``: what one call costs the host, layer by layer, on a driver that launches nothing.

Every layer is called with the arguments that the layer above would pass it, and includes all layers below, down to
Triton's launcher (bench/stand_in). Beside them stand the same launches by Triton's own `kernel[grid](...)`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from bench import measure, stand_in, terminal
from bench.arguments import add_out, add_rounds, positive
from bench.records import write
from bench.terminal import Bar, Table, Terminal
from isa_triton import Partition, ops, partitioned_attention, replays, tiles
from isa_triton.backend import triton
from isa_triton.backend.contract import Call, Inputs
from isa_triton.backend.kernels import launch, plan

TARGET = "sm_90"
BARE, MULTIPLIED = "bare Python call", "torch's own multiplication and its backward"
NOTHING = "a Function that does nothing, and its backward"  # what autograd takes of any in Python
FIRST, DOOR, LEARNED = "partitioned_attention, unlike any before", "partitioned_attention", "and its backward"
Layers = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """What is attended: small maps, for the host does the same for large ones."""

    partition: Partition
    key_width: int
    value_width: int
    heads: int = 1
    bias: bool = False

    def tensors(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """q, k and v."""
        pixels = 1, *self.partition.size, self.heads
        return [torch.ones(*pixels, width, dtype=dtype) for width in (self.key_width, self.key_width, self.value_width)]


CASES = {
    "64 tokens": Case(Partition.local((8, 16), (8, 8)), 32, 64),
    "49 tokens, bias": Case(Partition.local((14, 14), (7, 7)), 32, 32, 3, bias=True),
    "512 tokens": Case(Partition.dense((16, 32)), 32, 64),  # backward in passes
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Row:
    """A line of the CSV: a call of a layer and all below it."""

    pass_: str
    case: str
    dtype: str
    layer: str
    microseconds: float
    above_bare: float  # than a Python function that does nothing
    host: str
    versions: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_out(parser, "overhead.csv")
    add_rounds(parser, 100, "rounds, over which medians are taken")
    parser.add_argument("--calls", type=positive, default=100, metavar="N", help="of a layer in a round")
    terminal.add_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise argparse.ArgumentError(None, "TRITON_INTERPRET=1 interprets kernels, and nothing is launched: unset it")
    said, path, rows = Terminal(args), args.out / "overhead.csv", list[Row]()
    said.say(f"Every layer is a row of {path}")
    conditions = measure.conditions()
    passes: dict[str, Callable[[Case, torch.dtype], Layers]] = {"forward": forward, "training": training}
    bar = said.progress("rounds", len(passes) * len(CASES) * len(DTYPES) * (1 + args.rounds))
    torch.set_num_threads(1)
    with stand_in.installed(TARGET), bar as told:
        for pass_, layers in passes.items():
            for case, (dtype, torch_dtype) in ((c, d) for c in CASES for d in DTYPES.items()):
                medians = microseconds(layers(CASES[case], torch_dtype), args.rounds, args.calls, told)
                for layer, us in medians.items():
                    measured = round(us, 3), round(us - medians[BARE], 3)
                    rows.append(Row(pass_, case, dtype, layer, *measured, conditions["host"], conditions["versions"]))
    write(path, Row, rows)
    lines = [(r.pass_, r.case, r.dtype, r.layer, f"{r.microseconds:.2f}", f"{r.above_bare:.2f}") for r in rows]
    title = f"Microseconds a call, medians of {args.rounds}"
    said.show(Table(title, ("pass", "case", "dtype", "layer", "us", "above a bare call"), lines, words=4))
    said.end(f"A call costs the host {_spread(rows, DOOR)}; with its backward {_spread(rows, LEARNED)}.", path)


def _spread(rows: list[Row], layer: str) -> str:
    """From the least to the most of a layer's times."""
    times = sorted(row.microseconds for row in rows if row.layer == layer)
    return f"{times[0]:.0f} to {times[-1]:.0f} us"


def forward(case: Case, dtype: torch.dtype) -> Layers:
    """The layers of a call without gradients, the innermost first."""
    (q, k, v), bias = case.tensors(dtype), _bias(case, dtype)
    call = Call(0.1, case.partition, with_lse=False, backend="triton")
    out, tile = torch.empty_like(v), tiles.lookup(TARGET, "forward", *_problem(case, dtype))
    inputs, given = Inputs(q, k, v, bias), (q, k, v, bias, out, None)
    planned = *inputs, out, None
    rest = call.scale, case.partition, tile, "ieee"

    def door() -> Any:
        return partitioned_attention(q, k, v, case.partition, bias=bias, backend="triton")

    def first() -> Any:
        with patch.object(replays, "key", lambda *call: None):
            return door()

    return {
        BARE: lambda: _bare(q, k, v, bias),
        "kernel[grid](...)": _by_triton(plan.forward, plan.FORWARD, planned, rest),
        "launcher": lambda: launch.forward(*given, *rest),
        "backend: outputs, tile, device": lambda: triton.forward(inputs, call),
        "operator: dispatch": lambda: torch.ops.isa_triton.forward.default(*inputs, *call.flat()),
        "ops.attention: autograd": lambda: ops.attention(inputs, call),
        FIRST: first,
        DOOR: door,
    }


def training(case: Case, dtype: torch.dtype) -> Layers:
    """The layers of a call with gradients: those of backward, and forward and backward together."""
    (q, k, v), bias = case.tensors(dtype), _bias(case, dtype)
    call = Call(0.1, case.partition, with_lse=False, backend="triton")
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *([] if bias is None else [bias]))]
    a, b, c, *more = leaves
    do, dq, dk, dv = (torch.ones_like(x) for x in (v, q, k, v))
    chosen = tiles.backward(TARGET, *_problem(case, dtype))
    saved = [] if plan.in_one_kernel(chosen, case.partition) else [torch.ones(q.shape[:4]) for _ in range(2)]
    (out, lse), delta = (v, saved[0]) if saved else (None, None), saved[1] if saved else None
    partials = None
    if bias is not None:
        partials = torch.empty(plan.bias_partials_shape(1, case.heads, case.partition, chosen))
    inputs, given = Inputs(q, k, v, bias), (out, lse, do, None)
    written, rest = (dq, dk, dv, delta, partials), (call.scale, case.partition, chosen, "ieee")
    ready = [torch.empty_like(x) for x in leaves]
    run: Any = launch.backward
    alone: Any = triton.backward

    def attend() -> Any:
        return partitioned_attention(a, b, c, case.partition, bias=more[0] if more else None, backend="triton")

    return {
        BARE: lambda: _bare(q, k, v, do),
        "kernel[grid](...)": _by_triton(plan.backward, plan.BACKWARD, (*inputs, *given, *written), rest),
        "launcher": lambda: run(q, k, v, bias, *given, *written, *rest),
        "backend: gradients, tiles, device": lambda: alone(inputs, *given, call),
        "operator: dispatch": lambda: torch.ops.isa_triton.backward.default(*inputs, *given, *call.flat()),
        "partitioned_attention, recorded": attend,
        LEARNED: lambda: torch.autograd.grad(attend(), leaves, do),
        NOTHING: lambda: torch.autograd.grad(_Nothing.apply(v, ready, *leaves), leaves, do),
        MULTIPLIED: lambda: torch.autograd.grad(c * 2.0, c, do),
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


def _by_triton(planned: Any, names: tuple[str, ...], tensors: Any, rest: Any) -> Callable[[], None]:
    """The launches of a pass by Triton's own way, which looks at every argument in every call."""
    layouts = tuple(None if x is None else plan.Layout(x.shape, x.stride(), x.dtype, True) for x in tensors)
    launches = [
        (each.kernel[(each.programs,)], launch.filled(each, dict(zip(names, tensors, strict=True))), each.options)
        for each in planned(layouts, *rest)
    ]

    def run() -> None:
        for kernel, arguments, options in launches:
            kernel(**arguments, **options)

    return run


class _Nothing(torch.autograd.Function):
    """A tensor like another of some, which it saves; the gradients are there already."""

    @staticmethod
    def forward(ctx: Any, like: torch.Tensor, gradients: list[torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*tensors)
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.gradients[: len(ctx.saved_tensors)]


def _bias(case: Case, dtype: torch.dtype) -> torch.Tensor | None:
    return torch.ones(case.heads, *[case.partition.tokens] * 2, dtype=dtype) if case.bias else None


def _problem(case: Case, dtype: torch.dtype) -> tuple[int, int, str, int]:
    return case.key_width, case.value_width, str(dtype).removeprefix("torch."), case.partition.tokens


def _bare(q: Any, k: Any, v: Any, other: Any, backend: Any = None) -> Any:
    return other
