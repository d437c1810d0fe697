"""Part c: that the kernels are right where a device is used otherwise than by one call after another.

Every item says what it is in its docstring, which the page quotes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench import devices
from bench.certify import problems
from bench.certify.problems import Tensors, attend, learn
from bench.certify.rows import Found, Name, NotRun, Setting
from bench.tiles.compile import DTYPES, Problem
from isa_triton import Partition, partitioned_attention
from reference.attention import attention_of_groups, short_range_groups
from reference.budget import allowed_error

SHAPE = "Swin 49"  # a bias, several heads, and one kernel a pass
CYCLES = 200_000_000  # of a device that is kept busy: a tenth of a second
BEYOND = 2**31  # elements


def items(setting: Setting) -> list[Name]:
    return [(name,) for name in ITEMS]


def run(setting: Setting, name: str) -> Found:
    wrong = ITEMS[name](setting, problems.problem(setting, SHAPE, "float16" if setting.interpreted else "bfloat16"))
    return Found.judged(wrong or "")


def module(setting: Setting) -> Any:
    """`torch.cuda`, or whatever stands for it; a CPU has no streams and no graphs."""
    if setting.interpreted:
        raise NotRun("kernels are interpreted: there is no device with streams and graphs")
    return torch.get_device_module(setting.device)


def differs(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], what: str) -> str | None:
    """What is wrong where the bits of some results are not those of others."""
    names = "out", "dq", "dk", "dv", "dbias"
    wrong = [name for name, x, y in zip(names, got, wanted, strict=False) if not torch.equal(x, y)]
    return f"{what}: {', '.join(wrong)} differ from a call of its own" if wrong else None


def stream(setting: Setting, problem: Problem) -> str | None:
    """A stream of its own, busy while the call is queued: its kernels wait for the inputs that are written there."""
    on, side = module(setting), module(setting).Stream()
    old, new = (Tensors.of(problem, setting.device, seed) for seed in (0, 1))
    wanted = learn(problem, new)
    learn(problem, old)
    on.synchronize()
    with on.stream(side):
        on._sleep(CYCLES)
        old.like(new)
        got = learn(problem, old)
    on.synchronize()
    return differs(got, wanted, "on a stream of its own")


def second_device(setting: Setting, problem: Problem) -> str | None:
    """Tensors on a device that is not the current one."""
    if (count := module(setting).device_count()) < 2:
        raise NotRun(f"this machine has {count} device")
    other = next(i for i in range(count) if i != module(setting).current_device())
    kind = torch.device(setting.device).type
    here, there = Tensors.of(problem, setting.device), Tensors.of(problem, f"{kind}:{other}")
    there.like(here)
    got = tuple(x.to(setting.device) for x in learn(problem, there))
    return differs(got, learn(problem, here), "on another device")


def graph(setting: Setting, problem: Problem) -> str | None:
    """Forward and backward captured in one graph, replayed for other inputs."""
    return _captured(setting, problem, learn)


def graph_forward(setting: Setting, problem: Problem) -> str | None:
    """Forward without gradients captured in a graph, replayed for other inputs."""

    @torch.no_grad()
    def forward(problem: Problem, tensors: Tensors) -> tuple[Tensor, ...]:
        return (attend(problem, tensors),)

    return _captured(setting, problem, forward)


def _captured(setting: Setting, problem: Problem, call: Callable[[Problem, Tensors], tuple[Tensor, ...]]) -> str | None:
    on, side = module(setting), module(setting).Stream()
    held, new = (Tensors.of(problem, setting.device, seed) for seed in (0, 1))
    side.wait_stream(on.current_stream())
    with on.stream(side):
        for _ in range(3):  # compiles, and is known from then on
            call(problem, held)
    on.current_stream().wait_stream(side)
    graph = on.CUDAGraph()
    with on.graph(graph):
        got = call(problem, held)
    held.like(new)
    graph.replay()
    on.synchronize()
    return differs(got, call(problem, new), "replayed")


def compiled(setting: Setting, problem: Problem) -> str | None:
    """`torch.compile(fullgraph=True)`, forward and backward."""
    return _traced(setting, problem, backend="eager" if setting.interpreted else "inductor")


def reduce_overhead(setting: Setting, problem: Problem) -> str | None:
    """`torch.compile(mode="reduce-overhead")`, whose graphs are CUDA's, over five calls."""
    module(setting)
    return _traced(setting, problem, mode="reduce-overhead")


def _traced(setting: Setting, problem: Problem, **how: Any) -> str | None:
    @partial(torch.compile, fullgraph=True, **how)
    def doubled(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * partitioned_attention(q, k, v, problem.partition, bias=bias, backend="triton")

    try:
        for seed in range(1 if setting.interpreted else 5):
            torch.compiler.cudagraph_mark_step_begin()
            tensors = Tensors.of(problem, setting.device, seed)
            out = doubled(tensors.q, tensors.k, tensors.v, tensors.bias)
            gradients = torch.autograd.grad(out, tensors.leaves, tensors.do / 2)
            got = out.detach() / 2, *(x.clone() for x in gradients)
            if wrong := differs(got, learn(problem, tensors), f"call {1 + seed}"):
                return wrong
    finally:
        torch.compiler.reset()
    return None


def autocast(setting: Setting, problem: Problem) -> str | None:
    """fp32 tensors under autocast: the bits of a call in 16 bits with a bias of fp32, gradients in fp32."""
    wide = Tensors.of(replace(problem, dtype="float32"), setting.device)
    narrow = Tensors.of(problem, setting.device)
    narrow.like(wide)
    narrow = replace(narrow, bias=wide.bias)
    with torch.autocast(torch.device(setting.device).type, DTYPES[problem.dtype]):
        out = attend(problem, wide)
    gradients = torch.autograd.grad(out, wide.leaves, narrow.do)
    if any(gradient.dtype != torch.float32 for gradient in gradients):
        return f"gradients have the dtypes {', '.join(str(x.dtype) for x in gradients)}"
    out_of_16_bits, *others = learn(problem, narrow)
    return differs((out, *gradients), (out_of_16_bits, *(x.float() for x in others)), "under autocast")


def far_rows(setting: Setting, problem: Problem) -> str | None:
    """Rows of a map more than 2^31 elements from its first, in memory that holds little else."""
    size, width = (2, 4) if setting.interpreted else (8, 16), 16
    whole = size[0] - 1, BEYOND // (size[0] - 1) + 64
    partition, dtype = Partition.local(size, (2, 2)), torch.float16
    _wants(setting, 3 * BEYOND)
    memory = torch.empty(whole[0] * whole[1] + size[1] * width, dtype=dtype, device=setting.device)
    strides = memory.numel(), whole[1], width, width, 1
    far = memory.as_strided((1, *size, 1, width), strides)
    near = torch.randn(far.shape, dtype=dtype, device=setting.device)
    far.copy_(near)
    do = torch.randn_like(near)
    results = []
    for given in (far, near):
        q, k, v = (given.detach().requires_grad_() for _ in range(3))
        out = partitioned_attention(q, k, v, partition, backend="triton")
        results.append((out.detach(), *torch.autograd.grad(out, (q, k, v), do)))
    got, wanted = results
    return differs(got, wanted, "far apart")


def large_map(setting: Setting, problem: Problem) -> str | None:
    """A map of more than 2^31 elements, its first and last windows beside the formula, forward and backward."""
    module(setting)
    width, window = 64, 8
    side = window * (int((BEYOND / width) ** 0.5) // window + 1)
    _wants(setting, 6 * 2 * side * side * width)
    partition = Partition.local((side, side), (window, window))
    given = torch.randn(1, side, side, 1, width, dtype=torch.float16, device=setting.device)
    q, k, v = (given.detach().requires_grad_() for _ in range(3))
    out = partitioned_attention(q, k, v, partition, backend="triton")
    got = out.detach(), *torch.autograd.grad(out, (q, k, v), given)
    for y, x in product((0, side - window), repeat=2):
        here = slice(None), slice(y, y + window), slice(x, x + window)
        exact, eager = (_by_formula(given[here].to(dtype)) for dtype in (torch.float64, torch.float16))
        for name, result, wanted, plain in zip(("out", "dq", "dk", "dv"), got, exact, eager, strict=True):
            error = float((result[here].double() - wanted).abs().max())
            if not error <= allowed_error(name, wanted, plain, torch.float16, natural=float(wanted.abs().max())):
                return f"{name} of the window at {y}, {x} is wrong by {error:.3g}"
    return None


def _by_formula(window: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of one window that attends itself, and is the gradient that arrives."""
    q, k, v = (window.detach().requires_grad_() for _ in range(3))
    size = window.shape[1], window.shape[2]
    groups = short_range_groups(size, size)
    out, _ = attention_of_groups(q, k, v, None, window.shape[-1] ** -0.5, groups, size)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), window)


def _wants(setting: Setting, needed: int) -> None:
    if not setting.interpreted and needed > (there := devices.memory(setting.device)):
        raise NotRun(f"takes {needed / 1e9:.0f} GB, and the device has {there / 1e9:.0f}")


ITEMS: dict[str, Callable[[Setting, Problem], str | None]] = {
    "stream": stream, "second device": second_device, "graph, forward": graph_forward, "graph": graph,
    "compile": compiled, "reduce-overhead": reduce_overhead, "autocast": autocast, "far rows": far_rows,
    "large map": large_map,
}  # fmt: skip
