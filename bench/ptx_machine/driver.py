"""A Triton driver whose device is the machine: kernels on CPU tensors are compiled for a target and executed.

    with installed("sm_90") as device:
        kernel[grid](x, y, ...)  # Triton's, or a launcher of ours
    device.executions[-1].instructions

Triton compiles as ever, but for ptxas: the binary is the PTX itself. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from bench.ptx_machine import machine
from bench.ptx_machine.faults import Fault
from bench.ptx_machine.global_memory import Region
from bench.tiles.binaries import LIMITS
from isa_triton import replays
from isa_triton.backend import triton as backend

FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I",
           "u64": "Q", "fp32": "f", "fp64": "d"}  # fmt: skip
SCRATCH = ("*", None), ("*", None)  # pointers that Triton appends to every kernel's arguments


class Device(DriverBase):
    """The driver of the machine.

    Attributes:
        executions: of every launch.
        change: what the PTX of a kernel is replaced by, for mutants.
    """

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target, self.utils = GPUTarget("cuda", int(target.removeprefix("sm_")), 32), self
        self.executions: list[machine.Execution] = []
        self.change: Callable[[str], str] = lambda text: text

    @classmethod
    def is_active(cls) -> bool:
        return False  # only where it is set

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": LIMITS[f"sm_{self.target.arch}"].shared_of_cta}

    def get_benchmarker(self) -> Any:
        raise RuntimeError("the machine's time says nothing of a GPU's")

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        """Module, function, registers, spills and threads; the function is the text and its shared memory."""
        return None, (binary.decode(), shared), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        """What Triton calls for each launch."""

        def launch(x: int, y: int, z: int, stream: int, function: tuple[str, int], *rest: Any) -> None:
            arguments = list(flat(tuple(source.signature.values()), rest[4:]))
            text, shared = function
            given = pack([*arguments, *SCRATCH]), regions(arguments)
            self.executions.append(machine.execute(self.change(text), (x, y, z), shared, *given))

        return launch


def flat(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Types and values of the arguments as the device gets them: tuples are opened and constants left out."""
    if isinstance(kind, (tuple, list)):
        for parts in zip(kind, value, strict=True):
            yield from flat(*parts)
    elif kind != "constexpr":
        yield kind, value


def pack(arguments: list[tuple[str, Any]]) -> bytes:
    """Arguments in memory, each at a multiple of its size."""
    data = bytearray()
    for kind, value in arguments:
        is_pointer = kind.startswith("*")
        form, value = ("Q", 0 if value is None else value.data_ptr()) if is_pointer else (FORMATS[kind], value)
        data += bytes(-len(data) % struct.calcsize(form)) + struct.pack(form, value)
    return bytes(data)


def regions(arguments: list[tuple[str, Any]]) -> list[Region]:
    """The memory of tensors among the arguments: of each storage, the bytes where one of them has an element."""
    found: dict[int, Region] = {}
    for kind, x in arguments:
        if kind.startswith("*") and x is not None:
            if not isinstance(x, torch.Tensor):
                raise Fault(f"the machine must know how large a tensor is, got its address {x}")
            storage = x.untyped_storage()
            start, size = storage.data_ptr(), storage.nbytes()
            if size and start not in found:
                data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
                found[start] = Region(start, data, np.zeros(size, bool), start)
            if x.numel():
                of_elements = torch.from_numpy(found[start].exists[: size - size % x.itemsize].reshape(-1, x.itemsize))
                torch.as_strided(of_elements, (*x.shape, x.itemsize), (*(x.itemsize * n for n in x.stride()), 1),
                                 x.itemsize * x.storage_offset()).fill_(True)  # fmt: skip
    return list(found.values())


def without_ptxas(*given: Any) -> tuple[str, str] | None:
    """Triton's hook on the stages of its compiler: the last one hands on what it gets."""
    if not given:
        return "ptx", "ptx"  # what tells its binaries from others in caches
    _, stages, *_ = given
    stages["cubin"] = lambda text, metadata: text.encode()
    return None


@contextmanager
def installed(target: str) -> Iterator[Device]:
    """Kernels of calls on CPU tensors are compiled for a target of NVIDIA's, and executed.

    Raises:
        RuntimeError: kernels are interpreted in this process.
        ValueError: the machine does not know the target.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("kernels are interpreted in this process: unset TRITON_INTERPRET to compile them")
    if target not in (known := [name for name in LIMITS if name.startswith("sm_")]):
        raise ValueError(f"target must be one of {', '.join(known)}, got {target!r}")
    changed: dict[str, Any] = {
        "DEVICES": (*backend.DEVICES, "cpu"), "target_of": lambda device: target, "_on": lambda device: nullcontext(),
        "can_replay": lambda *tensors: False,
    }  # fmt: skip
    device, hook, before = Device(target), knobs.runtime.add_stages_inspection_hook, driver._active
    with patch.multiple(backend, **changed):
        driver.set_active(device)
        knobs.runtime.add_stages_inspection_hook = without_ptxas
        replays.forget()
        try:
            yield device
        finally:
            knobs.runtime.add_stages_inspection_hook = hook
            driver.set_active(before)
            replays.forget()
