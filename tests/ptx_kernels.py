"""Little kernels in PTX, written by hand, and how they are run on the machine."""

from __future__ import annotations

import re
import struct
from typing import Any

import numpy as np

from bench.ptx_machine import machine
from bench.ptx_machine.global_memory import Region

Array = np.ndarray[Any, Any]
REGISTERS = ".reg .pred %p<16>; .reg .b16 %rs<64>; .reg .b32 %r<400>; .reg .b64 %rd<64>;"
FILES = {"8": "%rs", "16": "%rs", "32": "%r", "64": "%rd"}
DTYPES: dict[str, Any] = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64, "pred": np.uint32}


def text(body: str, arrays: int, threads: int = 32) -> str:
    """A kernel that takes so many pointers, which begin in %rd0, %rd1, ..., the thread's number being in %r0."""
    given = ",\n".join(f"\t.param .u64 .ptr .global .align 1 test_param_{i}" for i in range(arrays))
    loads = "".join(f"\tld.param.b64 %rd{i}, [test_param_{i}];\n" for i in range(arrays))
    lines = "".join(f"\t{line.strip()}\n" for line in body.strip().splitlines())
    return (
        f".version 8.7\n.target sm_90a\n.address_size 64\n.extern .shared .align 16 .b8 global_smem[];\n"
        f".visible .entry test(\n{given}\n)\n.reqntid {threads}\n{{\n\t{REGISTERS}\n{loads}\tmov.u32 %r0, %tid.x;\n"
        f"{lines}\tret;\n}}\n"
    )


def aligned(x: Array) -> Array:
    """A copy of an array that begins at a multiple of 64 bytes, as a tensor does."""
    room = np.zeros(x.nbytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    copy = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def run(body: str, *arrays: Array, threads: int = 32, shared: int = 0, programs: int = 1) -> machine.Execution:
    """Run a kernel on arrays, which it may change."""
    held = [aligned(x) for x in arrays]
    regions = [
        Region(x.ctypes.data, x.reshape(-1).view(np.uint8), np.ones(x.nbytes, bool), i) for i, x in enumerate(held)
    ]
    parameters = struct.pack(f"{len(held)}Q", *(x.ctypes.data for x in held))
    try:
        return machine.execute(text(body, len(arrays), threads), (programs, 1, 1), shared, parameters, regions)
    finally:
        for x, copy in zip(arrays, held, strict=True):
            if x.flags.writeable:
                x[...] = copy


def dtype(kind: str) -> Any:
    """NumPy's of a type of PTX."""
    return DTYPES.get(kind) or np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}").type


def elementwise(line: str, result: str, *operands: str) -> str:
    """The body of a kernel: thread t puts `line`, with {d} and {a}, {b}, ... filled in, of elements t into element t."""
    body, names = "", dict[str, str]()
    for i, kind in enumerate(operands, 1):
        size, bits = np.dtype(dtype(kind)).itemsize, 8 * np.dtype(dtype(kind)).itemsize
        register = f"{FILES[str(bits)]}{10 + i}"
        body += f"mad.wide.u32 %rd{20 + i}, %r0, {size}, %rd{i};\nld.global.b{bits} {register}, [%rd{20 + i}];\n"
        if kind == "pred":
            body += f"setp.ne.b32 %p{i}, {register}, 0;\n"
            register = f"%p{i}"
        names["abcd"[i - 1] if i < 4 else "e"] = register
    size = np.dtype(dtype(result)).itemsize
    to = "%p0" if result == "pred" else f"{FILES[str(8 * size)]}30"
    body += line.format(d=to, **names) + ";\n"
    if result == "pred":
        body += "selp.b32 %r30, 1, 0, %p0;\n"
    return body + f"mad.wide.u32 %rd20, %r0, {size}, %rd0;\nst.global.b{8 * size} [%rd20], {FILES[str(8 * size)]}30;\n"


def lane_values(bits: int, count: int, seed: int = 0) -> Array:
    """[count, 32] numbers of some bits, no two alike in a row."""
    return np.random.default_rng(seed).integers(0, 1 << bits, (count, 32), np.uint64).astype(f"u{bits // 8}")


def opcodes(body: str) -> set[str]:
    """Those of a body."""
    return {match[1] for match in re.finditer(r"^\s*(?:@!?%\w+\s+)?([a-z][\w.:]+)", body, re.M)}
