"""How long the calls of a device take, and what its memory and its clocks are: the instruments behind `bench.measure`.

On a GPU the host is slower than small kernels, and a call that follows itself finds its inputs in the L2 cache. So a
call is captured into a graph and replayed behind a read of more than the cache holds: its kernels run with nothing
between them, on inputs from memory. What cannot be captured is queued behind such reads, as many as it takes the
host to queue it; where the call itself waits for the device, that wait is in its time.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Literal

import torch

Call = Callable[[], object]
How = Literal["clock", "graph", "queue"]
READ = 2**29  # bytes, at least: twice as many as the largest last-level cache of today has (MI300: 256 MiB)
LONGEST_QUEUE = 0.1  # seconds of reads ahead of a call: what takes longer to queue is not made of small kernels
CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem"


class Timer:
    """Times calls on one device; calls that it has timed keep their graphs, in one pool of memory, as long as it lives.

    Args:
        device: a device of this machine; the CPU's calls are timed by the clock.

    Attributes:
        how: of the last call that was timed: by the "clock", as a replayed "graph", or in a "queue" of work.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.how: How = "clock"
        self._prepared: dict[Call, tuple[Call, How, int]] = {}  # how calls are made again, and behind how many reads
        if self.device.type != "cpu":
            self._module = torch.get_device_module(self.device)
            self._pool: Any = None  # of all graphs: none is replayed beside another, so all may use the same memory
            cache_bytes = getattr(self._module.get_device_properties(self.device), "L2_cache_size", 0)
            self._numbers = max(READ, 2 * cache_bytes) // 4
            self._large: torch.Tensor | None = None  # of so many numbers, made when it is first read

    def seconds(self, call: Call, count: int) -> list[float]:
        """Seconds of `count` calls; on a GPU a call that is new here is made once before, and captured, untimed.

        Raises:
            torch.OutOfMemoryError: the device has no memory for the call, or for its graph.
            Exception: whatever the call raises.
        """
        if self.device.type == "cpu":
            return [_clocked(call) for _ in range(count)]
        with stream(self.device):
            if call not in self._prepared:
                self._prepared[call] = self._prepare(call)
            again, self.how, reads = self._prepared[call]
            spans = [self._timed(again, reads) for _ in range(count)]
            self._module.synchronize(self.device)
        return [start.elapsed_time(stop) / 1000 for start, stop in spans]

    def _prepare(self, call: Call) -> tuple[Call, How, int]:
        """How a call is made again: as a graph, or itself; and how many reads last until the host has queued it."""
        call()  # compiles what there is to compile, and raises what there is to raise
        self._module.synchronize(self.device)
        graph = self._captured(call)
        again: Call = call if graph is None else graph.replay
        how: How = "queue" if graph is None else "graph"
        again()
        self._module.synchronize(self.device)
        host = _clocked(again)
        start, stop = self._timed(self._read, reads=1)  # whose first makes what is read
        self._module.synchronize(self.device)
        read = max(start.elapsed_time(stop) / 1000, 1e-6)
        return again, how, 1 + math.ceil(min(host, LONGEST_QUEUE) / read)

    def _captured(self, call: Call) -> Any:
        """The graph of a call, or None where it cannot be captured: it waits for the device, or the device has none."""
        if not hasattr(self._module, "CUDAGraph"):
            return None
        self._pool = self._pool or self._module.graph_pool_handle()
        graph = self._module.CUDAGraph()
        try:
            with self._module.graph(graph, pool=self._pool, stream=self._module.current_stream(self.device)):
                call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # the call has succeeded before: this is about its capture
            self._module.synchronize(self.device)
            self._pool = None  # nobody says what a capture that failed has left there
            return None
        return graph

    def _timed(self, call: Call, reads: int) -> tuple[Any, Any]:
        """Events before and behind a call that is queued behind reads."""
        start, stop = (torch.Event(self.device, enable_timing=True) for _ in range(2))
        for _ in range(reads):
            self._read()
        start.record()
        call()
        stop.record()
        return start, stop

    def _read(self) -> None:
        """Leaves nothing but zeros in the L2 cache, and nothing there to be written back."""
        if self._large is None:
            self._large = torch.zeros(self._numbers, device=self.device)
        self._large.sum()


def _clocked(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def stream(device: str | torch.device) -> AbstractContextManager[object]:
    """The stream that a `Timer` makes calls on: backward runs where forward ran, and only there it can be captured."""
    device = torch.device(device)
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    module.synchronize(device)  # inputs were made on another
    return module.stream(_stream(device.type, module.current_device() if device.index is None else device.index))


@cache
def _stream(kind: str, index: int) -> Any:
    return torch.get_device_module(kind).Stream(torch.device(kind, index))


def peak_bytes(device: str | torch.device, call: Call) -> int:
    """The most bytes that a call had allocated at once, above what was there before, by the allocator's statistics.

    The call is made twice: what compilers and libraries allocate at a first one, and keep, is not the call's.

    Raises:
        ValueError: the device is a CPU, whose allocator keeps no statistics.
    """
    if torch.device(device).type == "cpu":
        raise ValueError(f"device must have an allocator with statistics, got {str(device)!r}")
    module = torch.get_device_module(device)
    with stream(device):
        call()
        module.synchronize(device)
        before = module.memory_allocated(device)
        module.reset_peak_memory_stats(device)
        call()
        module.synchronize(device)
    return module.max_memory_allocated(device) - before


def clocks(device: str | torch.device) -> str:
    """The clocks that the driver reports, as "SM 1755 of 1980 MHz, memory 2619 MHz"; nothing where it reports none."""
    if torch.device(device).type != "cuda" or not shutil.which("nvidia-smi"):
        return ""
    uuid = torch.get_device_module(device).get_device_properties(device).uuid  # indices are others than CUDA's
    which = f"--id=GPU-{str(uuid).removeprefix('GPU-')}"
    words = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader,nounits", which]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
        now, most, memory_ = (number.strip() for number in done.stdout.strip().split(","))
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""
    return f"SM {now} of {most} MHz, memory {memory_} MHz"


def account(hows: Iterable[str], clocks: Iterable[str]) -> str:
    """How times of a device were found out, and at which clocks, in a sentence; nothing of a CPU.

    >>> account(["graph", "queue", "graph"], ["SM 1755 of 1980 MHz, memory 2619 MHz"] * 2)
    'Timed 2 as replayed graphs and 1 in a queue of work, at SM 1755 of 1980 MHz, memory 2619 MHz.'
    """
    words = {"graph": "as replayed graphs", "queue": "in a queue of work"}
    numbers, seen = Counter(how for how in hows if how in words), list(dict.fromkeys(filter(None, clocks)))
    if not numbers:
        return ""
    at = f", at {seen[0]}{f' to {seen[-1]}' * (len(seen) > 1)}" if seen else ""
    return f"Timed {' and '.join(f'{number} {words[how]}' for how, number in numbers.items())}{at}."


def memory(device: str | torch.device) -> int:
    """Bytes of memory of a device, in use or not."""
    if torch.device(device).type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.get_device_module(device).get_device_properties(device).total_memory


def release(device: str | torch.device) -> None:
    """Give a device the memory back that nothing refers to any more; a CPU has it already."""
    if torch.device(device).type != "cpu":
        gc.collect()
        torch.get_device_module(device).empty_cache()
