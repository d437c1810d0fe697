"""A CUDA driver that launches nothing: what a call costs the host, and which kernels it launches, without a GPU.

Triton's own driver, compiler and launcher run on top of it; a GPU's tensors are the CPU's. TRITON_INTERPRET must not be
set, and a process that has used it has no other driver.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from triton import knobs
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime.driver import driver

from isa_triton import replays
from isa_triton.backend import triton as backend

SOURCE = Path(__file__).with_name("cuda.c")


class Launches:
    """What was launched since this was made, or last asked for."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.before, self.expected = library, library.stand_in_launches(), 0

    def count(self) -> int:
        """How many."""
        return self.library.stand_in_launches() - self.before

    def names(self) -> list[str]:
        """The kernels, in order."""
        begin, self.before = self.before, self.library.stand_in_launches()
        return [self.library.stand_in_name(i).decode() for i in range(begin, self.before)]

    def expect(self, sizes: Sequence[int]) -> None:
        """Keep the parameters of launches, which have so many bytes each."""
        self.library.stand_in_expect(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
        self.expected = len(sizes)

    def parameters(self) -> list[bytes]:
        """Those of the last launch, of eight bytes each, zeros behind those of fewer."""
        kept = self.library.stand_in_parameters()
        return [bytes(ctypes.c_uint64(kept[i])) for i in range(self.expected)]

    def loads(self) -> int:
        """How many binaries were ever loaded."""
        return self.library.stand_in_loads()


class StandIn(CudaDriver):
    """Triton's own driver, of a GPU that PyTorch knows nothing of."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.get_device_capability = lambda device: capability


@cache
def library() -> ctypes.CDLL:
    """The driver, built, and loaded in the place of any other."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET to launch them")
    folder = Path(tempfile.mkdtemp())
    built = folder / "libcuda.so.1"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", built, SOURCE], check=True)
    loaded = ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)
    for name in ("stand_in_launches", "stand_in_loads"):
        getattr(loaded, name).restype = ctypes.c_long
    loaded.stand_in_parameters.restype = ctypes.POINTER(ctypes.c_uint64)
    loaded.stand_in_name.restype, loaded.stand_in_name.argtypes = ctypes.c_char_p, [ctypes.c_long]
    knobs.nvidia.libcuda_path = str(folder)
    return loaded


@contextmanager
def installed(target: str = "sm_90") -> Iterator[Launches]:
    """Kernels of calls on CPU tensors are compiled for a target and launched on the stand-in.

    Args:
        target: an architecture of NVIDIA's.
    """
    loaded = library()
    major, minor = divmod(int(target.removeprefix("sm_")), 10)
    changed: dict[str, Any] = {
        "DEVICES": (*backend.DEVICES, "cpu"), "target_of": lambda device: target, "_on": lambda device: nullcontext()
    }  # fmt: skip
    with patch.multiple(backend, **changed):
        driver.set_active(StandIn((major, minor)))
        replays.forget()
        try:
            yield Launches(loaded)
        finally:
            replays.forget()
