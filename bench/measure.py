"""One instrument a quantity: FLOPs and peak bytes are counted on fake tensors, seconds are those of `bench.devices`.

A `Step` is one call of a provider on a workload, everything it needs included. It is counted from its making on, so
that inputs, parameters and gradients are seen like every other tensor.
"""

from __future__ import annotations

import platform
import statistics
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bench import devices
from bench.compared import Provider
from bench.workload import Workload
from isa_triton._tracing import has_modes

Step = Callable[[], tuple[Tensor, ...]]

# Operators that PyTorch's table of FLOP formulas lacks and would count as nothing, beside those that have the formula.
for _missing, _known in (
    ("baddbmm_", "baddbmm"),
    ("addmm_", "addmm"),
    ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    ("_scaled_dot_product_flash_attention_for_cpu_backward", "_scaled_dot_product_flash_attention_backward"),
):
    flop_registry.setdefault(getattr(torch.ops.aten, _missing), flop_registry[getattr(torch.ops.aten, _known)])


def step(provider: Provider, workload: Workload, device: str = "cpu", inputs: tuple[Tensor, ...] | None = None) -> Step:
    """One call: the output alone, or in a training pass the output and the gradients of all inputs and parameters.

    Compilers compile in the first one.

    Args:
        provider: whose implementation is called.
        workload: what it is called on.
        device: where inputs and parameters live.
        inputs: the workload's inputs, for providers that share them; made here when not given.
    """
    inputs = workload.inputs(device) if inputs is None else inputs
    function = provider.build(workload, device)
    if provider.compiled and not has_modes():  # of counters, which see the operators that are compiled
        function = torch.compile(function, dynamic=False)
    if not workload.training:
        return forward(function, *inputs)
    parameters = function.parameters() if isinstance(function, nn.Module) else ()
    return training(lambda: function(*inputs), (*inputs, *parameters), workload.upstream(device))


def forward(function: Callable[..., Tensor], *inputs: Tensor) -> Step:
    """Calls without autograd."""
    return torch.no_grad()(lambda: (function(*inputs),))


def training(call: Callable[[], Tensor], leaves: Sequence[Tensor], upstream: Tensor) -> Step:
    """Calls forward and backward, which return the output and the gradients of the leaves."""

    def step() -> tuple[Tensor, ...]:
        output = call()
        output.backward(upstream)  # autograd.grad does not work under the FLOP counter
        gradients: Any = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None
        return output, *gradients

    return step


def count(make: Callable[[], Step], fake: bool = True) -> tuple[int, int]:
    """FLOPs of one call of the step that `make` builds, and peak bytes with its making.

    Folding weights is no part of a call, the weights are. On fake tensors, unless told, so that any size is cheap.
    """
    with FakeTensorMode() if fake else nullcontext(), Counter() as counter:
        step = make()
        counter.flops = 0
        step()
    return counter.flops, counter.peak_bytes


class Counter(TorchDispatchMode):
    """Counts FLOPs and live bytes of everything that runs, and is created, inside the mode; real tensors do as well.

    `flops` is what torch's FlopCounterMode says, from its table of formulas: 2 to a multiply-add of matmuls,
    convolutions and scaled_dot_product_attention, nothing for the rest. (That mode takes twice as long over many small
    operators.)

    `peak_bytes` is the most bytes alive at once: inputs, outputs, parameters, gradients and everything in between. A
    storage counts once, however many views it has, until the last is gone. A kernel's own scratch space is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live_bytes = self.peak_bytes = 0
        self._followed: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._followed:
            self._followed.add(id(storage))
            weakref.finalize(storage, self._forget, id(storage), storage.nbytes()).atexit = False
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, identity: int, nbytes: int) -> None:
        self._followed.discard(identity)
        self.live_bytes -= nbytes


class Samples(NamedTuple):
    """What calls of a step took, and how that was found out, as `devices.Timer.how` says it."""

    seconds: tuple[float, ...]
    how: str


def samples(
    steps: Mapping[str, Step],
    *,
    rounds: int = 7,
    budget: float = 2.0,
    device: str = "cpu",
    failures: dict[str, str] | None = None,
) -> dict[str, Samples]:
    """Seconds of calls of each step in interleaved rounds (A B C C B A), so that a drifting machine is fair to all.

    The first sample of each is a warm-up, and its only one where the budget allows no second. On a device one more
    call goes before, untimed: kernels are compiled in it, which takes thousands of times as long.

    Args:
        steps: what to time, by name.
        rounds: the most samples of each, warm-up apart.
        budget: seconds after which a step is not repeated.
        device: where the steps run.
        failures: takes what a step raised, in a line; the step has no samples then. Without it, it is raised.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    timer, how = devices.Timer(device), dict[str, str]()
    for round_ in range(1 + rounds):
        for name, call in list(steps.items())[:: -1 if round_ % 2 else 1]:
            if name not in times or (times[name] and sum(times[name]) >= budget):
                continue
            try:
                times[name] += timer.seconds(call, 1)
                how[name] = timer.how
                continue
            except Exception as error:  # anyone's code runs here
                if failures is None:
                    raise
                failures[name] = in_a_line(error)
            del times[name]
            devices.release(device)  # not before: what was raised refers to what the call had allocated
    return {name: Samples(tuple(each[1:] or each), how[name]) for name, each in times.items()}


def in_a_line(error: Exception) -> str:
    """What was raised."""
    return " ".join([f"{type(error).__name__}:", *str(error).splitlines()[:1]])


def seconds(
    steps: Mapping[str, Step], *, rounds: int = 7, budget: float = 2.0, device: str = "cpu"
) -> dict[str, float]:
    """The medians of `samples`."""
    times = samples(steps, rounds=rounds, budget=budget, device=device)
    return {name: statistics.median(each.seconds) for name, each in times.items()}


def spread(times: Sequence[float]) -> float:
    """How far the median is above the fastest, as a part of it: what disturbs a call makes it slower, never faster."""
    return statistics.median(times) / min(times) - 1


def conditions(device: str = "cpu") -> dict[str, Any]:
    """Under which a row is found, by column: the model of the device, threads, versions, and the day."""
    on_cpu = torch.device(device).type == "cpu"
    host = _cpu() if on_cpu else torch.get_device_module(device).get_device_name(device)
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "isa_triton"))
    day = datetime.now(UTC).date().isoformat()
    return {"host": host, "threads": torch.get_num_threads(), "versions": versions, "date": day}


@cache
def _cpu() -> str:
    """The model of this CPU, as Linux names it; elsewhere its architecture."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    models = (
        value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == "model name"
    )
    return next(models, platform.processor() or platform.machine())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def matmul_rate(dtype: torch.dtype, device: str = "cpu", size: int = 1024) -> float:
    """FLOPs per second of a square matmul: a first guess at how fast a provider can be."""
    a = torch.ones(size, size, dtype=dtype, device=device)
    return 2 * size**3 / seconds({"matmul": lambda: (a @ a,)}, rounds=3, device=device)["matmul"]
