"""Reading a binary: registers, spills, memory, what its instructions are and how often they run.

NVIDIA's come from `cuobjdump` and `nvdisasm` (both in Triton's wheel), AMD's from the assembly that Triton keeps.
Accesses to rows of q, k, v and their like are told from those to one number a token by the line of source they serve.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs

from bench.tiles.assembly import Instruction, access, amd_instructions, is_atomic, matrix_kind, sass_instructions
from bench.tiles.compile import gpu_target, tuples
from bench.tiles.flow import Stretch, stretches
from bench.tiles.program import Loop, Op, read_program
from isa_triton.backend.kernels import common
from isa_triton.partition import ceil_div


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
    loops: tuple[Loop, ...] = ()  # of the IR
    ops: tuple[Op, ...] = ()  # of the IR
    stretches: tuple[Stretch, ...] = ()  # of the machine code

    def __post_init__(self) -> None:
        """Facts that come from JSON become what they were."""
        for name, kind in (("accesses", Access), ("loops", Loop), ("ops", Op), ("stretches", Stretch)):
            object.__setattr__(self, name, tuple(kind(*map(tuples, row)) for row in getattr(self, name)))


def read(kernel: Any, target: str) -> Binary:
    """The facts of a kernel that Triton compiled for a target."""
    if "cubin" in kernel.asm:
        usage = resource_usage(kernel.asm["cubin"])
        registers, stack = usage["REG"], usage["STACK"]
        instructions = list(sass_instructions(disassembly(kernel)))
        stack_accesses = sum(i.opcode.startswith(("STL", "LDL")) for i in instructions)
    else:
        text = kernel.asm["amdgcn"]
        registers, stack = amd_metadata(text, "vgpr_count"), amd_metadata(text, "private_segment_fixed_size")
        stack = max(stack, 4 * amd_metadata(text, "vgpr_spill_count"))
        instructions = list(amd_instructions(text))
        stack_accesses = sum(i.opcode.startswith("scratch_") for i in instructions)
    loops, ops, places = read_program(kernel.asm["ttir"])
    metadata = kernel.metadata
    warps, shared, columns = metadata.num_warps, metadata.shared, getattr(metadata, "tmem_size", 0) or 0
    return Binary(
        registers=registers,
        spill_bytes=stack,
        spill_accesses=stack_accesses,
        shared=shared,
        tensor_columns=columns,
        warps=warps,
        programs=min(occupancy(target, registers, warps, shared, columns).values()),
        instructions=len(instructions),
        matrix=dict(Counter(kind for i in instructions if (kind := matrix_kind(i.opcode)))),
        atomics=sum(is_atomic(i.opcode) for i in instructions),
        accesses=accesses(instructions),
        loops=tuple(loops),
        ops=tuple(ops),
        stretches=tuple(stretches(instructions, places, gpu_target(target).warp_size)),
    )


def disassembly(kernel: Any) -> str:
    """The machine code as text, with lines of source."""
    if "amdgcn" in kernel.asm:
        return str(kernel.asm["amdgcn"])
    return _nvidia_tool(knobs.nvidia.nvdisasm.path, "-c", "-gi", binary=kernel.asm["cubin"])


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What `cuobjdump -res-usage` says of a binary's one kernel: REG, STACK and others."""
    text = _nvidia_tool(knobs.nvidia.cuobjdump.path, "-res-usage", binary=cubin)
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", text.rpartition("Function")[2])}


def _nvidia_tool(*command: str, binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout


def amd_metadata(text: str, name: str) -> int:
    """A number of the kernel's descriptor at the end of AMD assembly."""
    match = re.search(rf"^\s+\.{name}:\s+(\d+)", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"the assembly does not say .{name}")
    return int(match[1])


def accesses(instructions: list[Instruction]) -> tuple[Access, ...]:
    """Global loads and stores, tensor copies among them, by width."""
    found = Counter((*kind, in_rows(i)) for i in instructions if (kind := access(i.opcode)))
    return tuple(Access(store, rows, width, n) for (store, width, rows), n in sorted(found.items()))


def in_rows(instruction: Instruction) -> bool:
    """Whether an instruction serves `common.load` or `common.store`, which alone touch rows of q, k, v and others."""
    return instruction.file == Path(common.__file__).name and instruction.line in _row_lines()


@cache
def _row_lines() -> frozenset[int]:
    helpers: tuple[Any, ...] = common.load, common.store
    sources = (inspect.getsourcelines(helper.fn) for helper in helpers)
    return frozenset(line for text, first in sources for line in range(first, first + len(text)))


def occupancy(target: str, registers: int, warps: int, shared: int, tensor_columns: int) -> dict[str, int]:
    """For how many programs each resource of a multiprocessor is enough; the least of them run at a time.

    Args:
        target: a key of `LIMITS`.
        registers: of a thread.
        warps: of a program; and so are the bytes of shared memory and the columns of tensor memory.
    """
    limits, lanes = LIMITS[target], gpu_target(target).warp_size
    registers_of_warp = ceil_div(max(registers, 1) * lanes, limits.granularity) * limits.granularity
    memory = limits.shared // max(shared + limits.shared_reserved, 1) if shared <= limits.shared_of_program else 0
    enough = {
        "programs": limits.programs,
        "threads": limits.threads // (warps * lanes),
        "registers": limits.registers // 4 // registers_of_warp * 4 // warps,  # a quarter for each of four schedulers
        "shared memory": memory,
    }
    return {**enough, "tensor memory": limits.tensor_columns // tensor_columns} if tensor_columns else enough
