"""A GPU by script: what `bench.devices` asks PyTorch for, with clocks of its own and tensors that are the CPU's.

The host and the device have each a time; the device does what it is given in order, when the host has given it:

    gpu = ScriptedDevice()
    with gpu.installed():
        Timer("cuda").seconds(lambda: gpu.launch("kernel", 5e-6), 3)
    assert gpu.timed[-3:] == [["kernel"]] * 3

A capture records launches and makes none, and fails where the host waits, as CUDA's does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from bench import devices

READ = "read"  # the launch that leaves nothing in the L2 cache
Launch = tuple[str, float, float]


class ScriptedDevice:
    """What was asked of a device, and its module in PyTorch (`torch.cuda`).

    Args:
        total: bytes of memory.
        host: seconds that the host takes for a launch, or for the replay of a graph.
        read: seconds of a read of more than the L2 cache.

    Attributes:
        launched: the names of all launches that ran, in order.
        timed: between each two events whose distance was asked for, the names of the launches that ran.
        streams: on which of them each launch ran; 0 is the default.
        pools: of the graphs that were captured.
        released: how often the allocator was told to give back what it keeps.
    """

    def __init__(self, total: int = 1 << 30, host: float = 10e-6, read: float = 100e-6) -> None:
        self.total, self.host_cost, self.read_cost = total, host, read
        self.host = self.end = 0.0  # the host's time, and when the device has done what it was given
        self.launched, self.timed, self.streams, self.pools = list[str](), list[list[str]](), list[int](), list[Any]()
        self.allocated = self.peak = self.released = self.current = 0
        self.captured: list[Launch] | None = None
        self.cold = True
        self.large = SimpleNamespace(sum=lambda: self.launch(READ, self.read_cost))

    # -- what a scripted call does

    def launch(self, name: str, seconds: float, cached: float | None = None) -> None:
        """A kernel of so many seconds, fewer where its inputs are in the cache: where no read went before."""
        launch = name, seconds, seconds if cached is None else cached
        if self.captured is None:
            self.host += self.host_cost
            self._run(launch)
        else:
            self.captured.append(launch)

    def wait(self) -> None:
        """The host waits for the device, as `.item()` does."""
        if self.captured is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.host = max(self.host, self.end)

    def allocate(self, nbytes: int) -> None:
        if self.allocated + nbytes > self.total:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes\nand more")
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)

    def free(self, nbytes: int) -> None:
        self.allocated -= nbytes

    def _run(self, launch: Launch) -> None:
        name, seconds, cached = launch
        self.end = max(self.end, self.host) + (seconds if self.cold else cached)
        self.cold = name == READ
        self.launched.append(name)
        self.streams.append(self.current)

    # -- what PyTorch has of it

    @contextmanager
    def installed(self) -> Iterator[ScriptedDevice]:
        """PyTorch's only device is this one, and the clock of `bench.devices` the host's."""
        zeros, ones = torch.zeros, torch.ones
        with ExitStack() as stack:
            for target, name, value in (
                (torch, "get_device_module", lambda device=None: self),
                (torch, "Event", lambda device, enable_timing: _Event(self)),
                (torch, "zeros", lambda *n, device=None, **o: self.large if device else zeros(*n, **o)),
                (torch, "ones", lambda *n, device=None, **o: _Square(self) if device else ones(*n, **o)),
                (devices, "time", SimpleNamespace(perf_counter=lambda: self.host)),
            ):
                stack.enter_context(patch.object(target, name, value))
            devices._stream.cache_clear()
            stack.callback(devices._stream.cache_clear)
            yield self

    def CUDAGraph(self) -> _Graph:
        return _Graph(self)

    @contextmanager
    def graph(self, graph: _Graph, pool: Any, stream: int) -> Iterator[None]:
        assert stream == self.current != 0, "a capture wants a stream, and the one that calls were made on before"
        self.pools.append(pool)
        self.captured = graph.launches
        try:
            yield
        finally:
            self.captured = None

    def graph_pool_handle(self) -> object:
        return object()

    def Stream(self, device: torch.device) -> int:
        assert device.index == 0
        return 7

    @contextmanager
    def stream(self, stream: int) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def current_stream(self, device: torch.device) -> int:
        return self.current

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: torch.device) -> None:
        self.wait()

    def memory_allocated(self, device: torch.device) -> int:
        return self.allocated

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.allocated

    def empty_cache(self) -> None:
        self.released += 1

    def get_device_properties(self, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(total_memory=self.total, L2_cache_size=50 << 20, uuid="0123-abc", name="A scripted GPU")

    def get_device_name(self, device: torch.device) -> str:
        return "A scripted GPU"


class _Graph:
    def __init__(self, device: ScriptedDevice) -> None:
        self.device, self.launches = device, list[Launch]()

    def replay(self) -> None:
        self.device.host += self.device.host_cost
        for launch in self.launches:
            self.device._run(launch)


class _Square:
    """A matrix on the device."""

    def __init__(self, device: ScriptedDevice) -> None:
        self.device = device

    def __matmul__(self, other: _Square) -> _Square:
        self.device.launch("matmul", 10e-6)
        return self


class _Event:
    def __init__(self, device: ScriptedDevice) -> None:
        self.device = device

    def record(self) -> None:
        self.device.end = max(self.device.end, self.device.host)
        self.when, self.index = self.device.end, len(self.device.launched)

    def elapsed_time(self, other: _Event) -> float:
        assert self.device.host >= other.when, "events are read before the device has come to them"
        self.device.timed.append(self.device.launched[self.index : other.index])
        return 1e3 * (other.when - self.when)


def kernels(gpu: ScriptedDevice, *names: str, seconds: float = 2e-6, cached: float = 1e-6) -> Callable[[], tuple[()]]:
    """A call that launches kernels of these names."""

    def call() -> tuple[()]:
        for name in names:
            gpu.launch(name, seconds, cached)
        return ()

    return call
