"""Reading a binary: registers, spills, memory, matrix instructions and the widths of global loads and stores.

NVIDIA's come from `cuobjdump` and `nvdisasm` (both in Triton's wheel), AMD's from the assembly that Triton keeps. Every
instruction is read with the line of source that it serves, so that accesses to rows of q, k, v and their like are told
from those to one number a token.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs

from isa_triton.kernels import common


class Limits(NamedTuple):
    """What one multiprocessor (AMD: compute unit) holds.

    NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; tensor memory: PTX ISA,
    "Tensor Memory". AMD: LLVM's "User Guide for AMDGPU Backend" (registers) and the CDNA3 and CDNA4 ISA guides (LDS).
    """

    registers: int  # 32-bit, of all threads
    granularity: int  # registers are given to a warp in steps of so many
    threads: int
    programs: int
    shared: int  # bytes
    shared_of_program: int  # bytes that one program can have
    shared_reserved: int  # bytes that every program costs beside its own
    tensor_columns: int = 0


LIMITS = {
    "sm_80": Limits(65536, 256, 2048, 32, 164 << 10, 163 << 10, 1 << 10),
    "sm_86": Limits(65536, 256, 1536, 16, 100 << 10, 99 << 10, 1 << 10),
    "sm_89": Limits(65536, 256, 1536, 24, 100 << 10, 99 << 10, 1 << 10),
    "sm_90": Limits(65536, 256, 2048, 32, 228 << 10, 227 << 10, 1 << 10),
    "sm_100": Limits(65536, 256, 2048, 32, 228 << 10, 227 << 10, 1 << 10, tensor_columns=512),
    "sm_103": Limits(65536, 256, 2048, 32, 228 << 10, 227 << 10, 1 << 10, tensor_columns=512),
    "sm_120": Limits(65536, 256, 1536, 24, 100 << 10, 99 << 10, 1 << 10),
    "gfx90a": Limits(131072, 512, 2048, 32, 64 << 10, 64 << 10, 0),  # 4 SIMDs of 512 registers a lane, in steps of 8
    "gfx942": Limits(131072, 512, 2048, 32, 64 << 10, 64 << 10, 0),
    "gfx950": Limits(131072, 512, 2048, 32, 160 << 10, 160 << 10, 0),
}


class Instruction(NamedTuple):
    """An opcode with its modifiers, and the file name and line of source it serves."""

    opcode: str
    file: str = ""
    line: int = 0


class Access(NamedTuple):
    """How a kernel's code reads or writes global memory in one way, and how often the code says so."""

    store: bool
    rows: bool  # rows of a [B, H, W, heads, width] tensor; else one number a token, or a pair of tokens
    width: int  # bytes of a thread at once
    times: int


@dataclass(frozen=True)
class Binary:
    """What the machine code of one kernel says."""

    registers: int  # of a thread; AMD: vector and accumulation registers
    spill_bytes: int  # of a thread's stack
    spill_accesses: int  # instructions that read or write the stack
    shared: int  # bytes a program
    tensor_columns: int  # of tensor memory, a program
    warps: int
    programs: int  # that run on a multiprocessor at a time; 0 if not even one fits
    instructions: int
    matrix: dict[str, int]  # matrix instructions by kind
    atomics: int
    accesses: tuple[Access, ...]


def read(kernel: Any) -> Binary:
    """The facts of a kernel that Triton compiled."""
    metadata = kernel.metadata
    if metadata.target.backend == "cuda":
        name, lanes = f"sm_{metadata.target.arch}", 32
        usage = resource_usage(kernel.asm["cubin"])
        registers, stack = usage["REG"], usage["STACK"]
        instructions = list(sass_instructions(disassembly(kernel)))
        stack_accesses = sum(i.opcode.startswith(("STL", "LDL")) for i in instructions)
    else:
        name, lanes = metadata.target.arch, metadata.target.warp_size
        text = kernel.asm["amdgcn"]
        registers, stack = amd_metadata(text, "vgpr_count"), amd_metadata(text, "private_segment_fixed_size")
        stack = max(stack, 4 * amd_metadata(text, "vgpr_spill_count"))
        instructions = list(amd_instructions(text))
        stack_accesses = sum(i.opcode.startswith("scratch_") for i in instructions)
    shared, columns = metadata.shared, getattr(metadata, "tmem_size", 0) or 0
    return Binary(
        registers=registers,
        spill_bytes=stack,
        spill_accesses=stack_accesses,
        shared=shared,
        tensor_columns=columns,
        warps=metadata.num_warps,
        programs=programs_at_once(LIMITS[name], registers, lanes, metadata.num_warps, shared, columns),
        instructions=len(instructions),
        matrix=dict(Counter(kind for i in instructions if (kind := matrix_kind(i.opcode)))),
        atomics=sum(is_atomic(i.opcode) for i in instructions),
        accesses=accesses(instructions),
    )


def disassembly(kernel: Any) -> str:
    """The machine code as text, with lines of source."""
    if "amdgcn" in kernel.asm:
        return str(kernel.asm["amdgcn"])
    return _nvidia_tool(knobs.nvidia.nvdisasm.path, "-c", "-g", binary=kernel.asm["cubin"])


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump -res-usage` says of a binary's one kernel: REG, STACK and others."""
    text = _nvidia_tool(knobs.nvidia.cuobjdump.path, "-res-usage", binary=cubin)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", text.rpartition("Function")[2])}


def _nvidia_tool(*command: str, binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


_SASS_LINE = re.compile(r'//## File "([^"]*)", line (\d+)')
_SASS_CODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")


def sass_instructions(text: str) -> Iterator[Instruction]:
    """The instructions of `nvdisasm -c -g`."""
    where: tuple[str, int] = ("", 0)
    for line in text.splitlines():
        if match := _SASS_LINE.search(line):
            where = Path(match[1]).name, int(match[2])
        elif match := _SASS_CODE.search(line):
            yield Instruction(match[1], *where)


_AMD_FILE = re.compile(r'\s*\.file\s+(\d+)\s+(?:"[^"]*"\s+)?"([^"]*)"')
_AMD_LINE = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
_AMD_CODE = re.compile(r"\s+([a-z]\w*)(?:\s|$)")


def amd_instructions(text: str) -> Iterator[Instruction]:
    """The instructions of AMD assembly."""
    files, where = dict[str, str](), ("", 0)
    for line in text.splitlines():
        if match := _AMD_FILE.match(line):
            files[match[1]] = Path(match[2]).name
        elif match := _AMD_LINE.match(line):
            where = files.get(match[1], ""), int(match[2])
        elif match := _AMD_CODE.match(line):
            yield Instruction(match[1], *where)


def amd_metadata(text: str, name: str) -> int:
    """A number of the kernel's descriptor at the end of AMD assembly."""
    match = re.search(rf"^\s+\.{name}:\s+(\d+)", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"the assembly does not say .{name}")
    return int(match[1])


def matrix_kind(opcode: str) -> str | None:
    """HMMA (warp), HGMMA (four warps), UTCHMMA (tensor memory), mfma or wmma (AMD), with TF32's apart; else None."""
    if match := re.match(r"(?:UTC)?[A-Z]G?MMA\b|UTC[A-Z]+MMA\b", opcode):
        return f"{match[0]}.TF32" if "TF32" in opcode else match[0]
    if match := re.match(r"v_s?(mfma|wmma)_", opcode):
        return f"{match[1]}.xf32" if "xf32" in opcode else match[1]
    return None


def is_atomic(opcode: str) -> bool:
    """Whether an instruction adds to global memory, in an order nobody knows."""
    return opcode.split(".")[0] in ("ATOM", "ATOMG", "RED", "REDG") or bool(
        re.match(r"(global|buffer|flat)_atomic", opcode)
    )


def accesses(instructions: list[Instruction]) -> tuple[Access, ...]:
    """Global loads and stores, tensor copies among them, by width."""
    found = Counter(
        (*access, in_rows(i)) for i in instructions if (access := _nvidia_access(i.opcode) or _amd_access(i.opcode))
    )
    return tuple(Access(store, rows, width, n) for (store, width, rows), n in sorted(found.items()))


TENSOR_COPY = 1 << 10  # bytes; a tensor copy moves whole rows, and all that matters is that it is wide


def _nvidia_access(opcode: str) -> tuple[bool, int] | None:
    name, *modifiers = opcode.split(".")
    if name in ("UTMALDG", "UBLKCP", "UTMASTG"):
        return name == "UTMASTG", TENSOR_COPY
    if name not in ("LDG", "LDGSTS", "LD", "STG", "ST"):
        return None
    bits = [int(m.strip("US")) for m in modifiers if re.fullmatch(r"[US]?(8|16|32|64|128|256)", m)]
    return name in ("STG", "ST"), (bits[-1] if bits else 32) // 8


_AMD_WIDTHS = {"byte": 1, "short": 2, "ushort": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16,
               "ubyte": 1, "sbyte": 1, "sshort": 2, "b8": 1, "b16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16,
               "u8": 1, "i8": 1, "u16": 2, "i16": 2}  # fmt: skip


def _amd_access(opcode: str) -> tuple[bool, int] | None:
    match = re.match(r"(?:global|buffer|flat)_(load|store)_(?:lds_|d16_)?([a-z]+(?:x\d|\d+)?)", opcode)
    return (match[1] == "store", _AMD_WIDTHS[match[2]]) if match else None


def in_rows(instruction: Instruction) -> bool:
    """Whether an instruction serves `common.load` or `common.store`, which alone touch rows of q, k, v and others."""
    return instruction.file == Path(common.__file__).name and instruction.line in _row_lines()


@cache
def _row_lines() -> frozenset[int]:
    helpers: tuple[Any, ...] = common.load, common.store
    sources = (inspect.getsourcelines(helper.fn) for helper in helpers)
    return frozenset(line for text, first in sources for line in range(first, first + len(text)))


def programs_at_once(limits: Limits, registers: int, lanes: int, warps: int, shared: int, tensor_columns: int) -> int:
    """How many programs a multiprocessor runs at a time; 0 where one does not fit."""
    registers_of_warp = -(-max(registers, 1) * lanes // limits.granularity) * limits.granularity
    if shared > limits.shared_of_program or tensor_columns > limits.tensor_columns:
        return 0
    fitting = [
        limits.programs,
        limits.threads // (warps * lanes),
        limits.registers // 4 // registers_of_warp * 4 // warps,  # a quarter belongs to each of four schedulers
        limits.shared // max(shared + limits.shared_reserved, 1),
    ]
    if tensor_columns:
        fitting.append(limits.tensor_columns // tensor_columns)
    return min(fitting)
