"""Binaries: each compiled and read once, on as many processes as there are, and judged by what may not ship.

What is read: registers, spills, memory, what the instructions are and how often they run. NVIDIA's come from
`cuobjdump` and `nvdisasm` (both in Triton's wheel), AMD's from the assembly that Triton keeps. Accesses to rows of
q, k, v and their like are told from those to one number a token by the line of source they serve.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from triton import knobs

from bench.records import write_text
from bench.terminal import Bar
from bench.tiles import assembly, program
from bench.tiles.compile import Launch, compile_launch, gpu_target, parts, tuples
from isa_triton.axis import ceil_div
from isa_triton.backend.kernels import common


class Limits(NamedTuple):
    """What one SM holds (CDNA: compute unit; RDNA: workgroup processor). A CTA (AMD: workgroup) runs one program.

    NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; tensor memory: PTX ISA,
    "Tensor Memory". AMD: LLVM's "User Guide for AMDGPU Backend" (registers) and the CDNA3 and CDNA4 ISA guides (LDS);
    RDNA: what LLVM's AMDGPUBaseInfo.cpp gives out of a workgroup processor in its default mode, and the RDNA3 ISA guide
    (LDS: 128 KiB, of which a workgroup has up to 64).
    """

    registers: int  # 32-bit, of all threads
    granularity: int  # registers are given to a warp in steps of so many
    threads: int
    ctas: int
    shared: int  # bytes
    shared_of_cta: int  # bytes that one CTA can have
    shared_reserved: int  # bytes that every CTA costs beside its own
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
    "gfx1100": Limits(
        196608, 768, 2048, 32, 128 << 10, 64 << 10, 0
    ),  # 4 SIMDs of 1536 registers a lane, in steps of 24
    "gfx1200": Limits(196608, 768, 2048, 32, 128 << 10, 64 << 10, 0),
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

    registers: int  # per thread; AMD: vector and accumulation registers
    spill_bytes: int  # of a thread's stack
    spill_accesses: int  # instructions that read or write the stack
    shared: int  # bytes a CTA
    tensor_columns: int  # of tensor memory, a CTA
    warps: int
    ctas_per_sm: int  # that fit; 0 if not even one does
    instructions: int
    matrix: dict[str, int]  # matrix instructions by kind
    atomics: int
    accesses: tuple[Access, ...]
    loops: tuple[program.Loop, ...] = ()  # of the IR
    ops: tuple[program.Op, ...] = ()  # of the IR
    stretches: tuple[assembly.Stretch, ...] = ()  # of the machine code

    def __post_init__(self) -> None:
        """Facts that come from JSON become what they were."""
        kinds = {"accesses": Access, "loops": program.Loop, "ops": program.Op, "stretches": assembly.Stretch}
        for name, kind in kinds.items():
            object.__setattr__(self, name, tuple(kind(*map(tuples, row)) for row in getattr(self, name)))


def read(kernel: Any, target: str) -> Binary:
    """The facts of a kernel that Triton compiled for a target."""
    if "cubin" in kernel.asm:
        usage = resource_usage(kernel.asm["cubin"])
        registers, stack = usage["REG"], usage["STACK"]
        instructions = list(assembly.sass_instructions(disassembly(kernel)))
        stack_accesses = sum(i.opcode.startswith(("STL", "LDL")) for i in instructions)
    else:
        text = kernel.asm["amdgcn"]
        registers, stack = amd_metadata(text, "vgpr_count"), amd_metadata(text, "private_segment_fixed_size")
        stack = max(stack, 4 * amd_metadata(text, "vgpr_spill_count"))
        instructions = list(assembly.amd_instructions(text))
        stack_accesses = sum(i.opcode.startswith("scratch_") for i in instructions)
    loops, ops, places = program.read_program(kernel.asm["ttir"], list(_variables(kernel.src.signature.items())))
    metadata = kernel.metadata
    warps, shared, columns = metadata.num_warps, metadata.shared, getattr(metadata, "tmem_size", 0) or 0
    return Binary(
        registers=registers, spill_bytes=stack, spill_accesses=stack_accesses,
        shared=shared, tensor_columns=columns, warps=warps,
        ctas_per_sm=min(ctas_by_resource(target, registers, warps, shared, columns).values()),
        instructions=len(instructions), atomics=sum(assembly.is_atomic(i.opcode) for i in instructions),
        matrix=dict(Counter(kind for i in instructions if (kind := assembly.matrix_kind(i.opcode)))),
        accesses=accesses(instructions), loops=tuple(loops), ops=tuple(ops),
        stretches=tuple(assembly.stretches(instructions, places, gpu_target(target).warp_size)),
    )  # fmt: skip


def disassembly(kernel: Any) -> str:
    """The machine code as text, with lines of source."""
    if "amdgcn" in kernel.asm:
        return str(kernel.asm["amdgcn"])
    return _nvidia_tool(knobs.nvidia.nvdisasm.path, "-c", "-gi", "-ndf", binary=kernel.asm["cubin"])


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


def accesses(instructions: list[assembly.Instruction]) -> tuple[Access, ...]:
    """Global loads and stores, tensor copies among them, by width."""
    found = Counter((*kind, in_rows(i)) for i in instructions if (kind := assembly.access(i.opcode)))
    return tuple(Access(store, rows, width, n) for (store, width, rows), n in sorted(found.items()))


def in_rows(instruction: assembly.Instruction) -> bool:
    """Whether an instruction serves `common.load` or `common.store`, which alone touch rows of q, k, v and others."""
    return instruction.file == Path(common.__file__).name and instruction.line in _row_lines()


@cache
def _row_lines() -> frozenset[int]:
    helpers: tuple[Any, ...] = common.load, common.store
    sources = (inspect.getsourcelines(helper.fn) for helper in helpers)
    return frozenset(line for text, first in sources for line in range(first, first + len(text)))


def ctas_by_resource(target: str, registers: int, warps: int, shared: int, tensor_columns: int) -> dict[str, int]:
    """For how many CTAs each resource of an SM is enough; the least of them are there at a time.

    Args:
        target: a key of `LIMITS`.
        registers: per thread.
        warps: of a CTA; and so are the bytes of shared memory and the columns of tensor memory.
    """
    limits, lanes = LIMITS[target], gpu_target(target).warp_size
    registers_of_warp = ceil_div(max(registers, 1) * lanes, limits.granularity) * limits.granularity
    memory = limits.shared // max(shared + limits.shared_reserved, 1) if shared <= limits.shared_of_cta else 0
    enough = {
        "CTAs": limits.ctas,
        "threads": limits.threads // (warps * lanes),
        "registers": limits.registers // 4 // registers_of_warp * 4 // warps,  # a quarter for each of four schedulers
        "shared memory": memory,
    }
    return {**enough, "tensor memory": limits.tensor_columns // tensor_columns} if tensor_columns else enough


def occupancy(target: str, ctas_per_sm: int, warps: int) -> float:
    """The part of the threads that an SM can hold that so many CTAs of so many warps are."""
    return ctas_per_sm * warps * gpu_target(target).warp_size / LIMITS[target].threads


# -- what must not ship -----------------------------------------------------------------------------------------------


def violations(launch: Launch, binary: Binary) -> list[str]:
    """What a shipped binary must not be or do, as far as this one is or does it.

    A spill is an access to the stack: a stack that no instruction touches (AMD keeps what it spilled in accumulation
    registers and counts it all the same) costs nothing. IEEE fp32 may spill, for all but CDNA multiply it on FMA units,
    out of registers; fp32 loads may be narrow, for Triton loads tf32 as its matrix units want it, 4 bytes at a time.
    """
    problem, exact = launch.problem, multiplies_fp32(launch.target)
    dtype, limits, matrix = problem.dtype, LIMITS[launch.target], sum(binary.matrix.values())
    found = []
    if dtype != "float32" and binary.spill_accesses:
        found.append(f"spills {binary.spill_bytes} bytes ({binary.spill_accesses} accesses)")
    if binary.shared > limits.shared_of_cta:
        found.append(f"wants {binary.shared} bytes of shared memory, there are {limits.shared_of_cta}")
    if binary.tensor_columns > limits.tensor_columns:
        found.append(f"wants {binary.tensor_columns} columns of tensor memory, there are {limits.tensor_columns}")
    if not found and not binary.ctas_per_sm:
        found.append(f"not one CTA of {binary.warps} warps with {binary.registers} registers fits")
    if not any(access.store for access in binary.accesses):
        found.append("stores nothing: an empty or trapping kernel")
    elif not matrix and (dtype != "float32" or exact):
        found.append("multiplies without the matrix units")
    if dtype == "float32" and (any("xf32" in kind for kind in binary.matrix) if exact else matrix):
        found.append("multiplies fp32 as tf32")  # or in fewer bits still: other matrix units know no fp32
    if binary.atomics:
        found.append(f"has {binary.atomics} atomic instructions: its sums are not deterministic")
    aligned = problem.key_width % 8 == problem.value_width % 8 == 0
    narrow = [access for access in binary.accesses if access.rows and not access.store and access.width < 16]
    if aligned and narrow and problem.itemsize == 2:
        found.append(f"loads rows {format_widths(narrow)} bytes at a time")
    return found


def multiplies_fp32(target: str) -> bool:
    """Whether the matrix units of a target multiply fp32 as it is: those of CDNA alone do."""
    return target.startswith("gfx9")


def format_widths(accesses: Iterable[Access]) -> str:
    """Bytes of a thread at once, and how many instructions access so many: 16x40 4x2."""
    widths = sorted(((a.width, a.times) for a in accesses), reverse=True)
    return " ".join(f"{'tensor' if width == assembly.TENSOR_COPY else width}x{count}" for width, count in widths) or "-"


class Verdict(NamedTuple):
    """What became of a launch."""

    launch: Launch
    binary: Binary | None  # None: it does not compile, which is its one violation
    violations: list[str]


@dataclass
class Binaries:
    """Compiles and reads launches, each binary once.

    Args:
        cache: the folder where facts of binaries are kept, by the hash of all that they depend on.
        pool: where compilers run.
        dump: a folder for each binary and its disassembly; with it everything is compiled again.
        bar: is told of each binary, where there is one.
    """

    cache: Path
    pool: Executor
    dump: Path | None = None
    bar: Bar | None = None

    def verdicts(self, launches: Iterable[Launch]) -> list[Verdict]:
        """What becomes of each launch, in their order."""
        launches = list(launches)
        wanted = {launch.key: launch for launch in launches}
        facts, pending = dict[str, Binary | str](), dict[Future[Binary | str], str]()
        if self.bar is not None:
            self.bar.expect(len(wanted))
        for key, launch in wanted.items():
            if (known := self.known(launch)) is not None:
                facts[key] = known
                self._advance(launch)
            else:
                pending[self.pool.submit(compile_and_read, launch, self.cache, self.dump)] = key
        for done in as_completed(pending):
            facts[key := pending[done]] = done.result()
            self._advance(wanted[key])
        return [_verdict(launch, facts[launch.key]) for launch in launches]

    def _advance(self, launch: Launch) -> None:
        if self.bar is not None:
            self.bar.now(f"{launch.target} {launch.problem.name} {launch.label}")
            self.bar.advance()

    def known(self, launch: Launch) -> Binary | None:
        """The facts, if an earlier run has left all that is asked for."""
        file = _file(self.cache, launch)
        return Binary(**json.loads(file.read_text())) if self.dump is None and file.exists() else None


def _variables(types: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Those of a kernel's arguments, and of the parts of its tuples, that are no constants."""
    for name, type_ in types:
        if isinstance(type_, tuple):
            yield from _variables(parts(name, type_))
        elif type_ != "constexpr":
            yield name


def _verdict(launch: Launch, facts: Binary | str) -> Verdict:
    if isinstance(facts, str):
        return Verdict(launch, None, [facts])
    return Verdict(launch, facts, violations(launch, facts))


def compile_and_read(launch: Launch, cache: Path, dump: Path | None = None) -> Binary | str:
    """The facts of a launch's binary, which are also kept in `cache`; or why there is no binary."""
    try:
        kernel = compile_launch(launch, cache / "triton")
    except Exception as error:  # whatever a compiler throws is a finding, and the other launches go on
        return f"does not compile: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    if dump is not None:
        stages = {**kernel.asm, "sass": disassembly(kernel)} if "cubin" in kernel.asm else kernel.asm
        for stage, content in stages.items():  # from Triton's IR to machine code
            file = dump_file(dump, launch, stage)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    facts = read(kernel, launch.target)
    write_text(_file(cache, launch), json.dumps(asdict(facts)))
    return facts


def dump_file(folder: Path, launch: Launch, stage: str = "") -> Path:
    """Where a stage of a launch's binary is dumped: by default the machine code as text."""
    stage = stage or ("sass" if launch.target.startswith("sm_") else "amdgcn")
    name = f"{launch.problem.name} {launch.problem.dtype} {launch.name} {launch.key[:6]}".replace(" ", "-")
    return folder / launch.target / f"{name}.{stage}"


_READERS = (__file__, *(str(module.__file__) for module in (assembly, program)))
_READER = hashlib.sha256(b"".join(Path(file).read_bytes() for file in _READERS)).hexdigest()[:8]


def _file(cache: Path, launch: Launch) -> Path:
    return cache / "facts" / launch.target / f"{_READER}-{launch.key}.json"
