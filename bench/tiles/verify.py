"""What a shipped binary must be: the shapes that people have, the binaries they launch, and what is wrong with each."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from bench.tiles import assembly, flow, program
from bench.tiles import read as reader
from bench.tiles.assembly import TENSOR_COPY
from bench.tiles.compile import Launch, Problem, backward_launches, compile_launch, forward_launches
from bench.tiles.read import LIMITS, Access, Binary, disassembly, read
from isa_triton import tiles
from isa_triton.backend.kernels.launch import in_one_kernel
from isa_triton.partition import Partition

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
ARITHMETIC = ("bfloat16", "float16", "tf32", "float32")


@dataclass(frozen=True)
class Shape:
    """Attention in a network that people run, on one of its maps."""

    name: str
    partition: Partition
    key_width: int
    value_width: int
    heads: int = 1
    bias: bool = False
    fp16: bool = False  # fp16 has the tiles of bf16 and other matrix instructions: compiled for some shapes only

    def problem(self, dtype: str) -> Problem:
        return Problem(self.partition, self.key_width, self.value_width, self.heads, self.bias, dtype)


def _interlaced(name: str, size: tuple[int, int], key: int, value: int, heads: int = 1, fp16: bool = False) -> Shape:
    return Shape(name, Partition.interlaced(size, stride=(8, 8)), key, value, heads, fp16=fp16)


def _windows(name: str, size: tuple[int, int], side: int, heads: int, width: int = 32, fp16: bool = False) -> Shape:
    return Shape(name, Partition.local(size, (side, side)), width, width, heads, bias=True, fp16=fp16)


def _grids(name: str, size: tuple[int, int], side: int, heads: int) -> Shape:
    return Shape(name, Partition.interlaced(size, grid=(side, side)), 32, 32, heads, bias=True)


SHAPES = (
    Shape("ISA 64", Partition.local((128, 256), (8, 8)), 256, 512, fp16=True),
    _interlaced("ISA 128", (64, 128), 256, 512),
    _interlaced("ISA 256", (128, 128), 256, 512, fp16=True),
    _interlaced("ISA 512", (128, 256), 256, 512),
    _interlaced("ISA 1024", (256, 256), 256, 512),
    Shape("heads 64", Partition.local((64, 128), (8, 8)), 64, 64, heads=8),
    _interlaced("heads 256", (128, 128), 64, 64, heads=8, fp16=True),
    _interlaced("heads 1024", (256, 256), 64, 64, heads=8),
    _windows("Swin 49", (56, 56), 7, heads=3, fp16=True),
    _windows("Swin 64", (64, 64), 8, heads=3),
    _windows("Swin 144", (48, 48), 12, heads=8),
    _windows("Swin 256", (32, 64), 16, heads=6),
    _grids("MaxViT 49", (56, 56), 7, heads=2),
    _grids("MaxViT 64", (64, 128), 8, heads=2),
    _grids("MaxViT 144", (96, 96), 12, heads=2),
    _grids("MaxViT 256", (64, 128), 16, heads=4),
    _windows("HRFormer 49", (64, 48), 7, heads=2, width=39),
    Shape("dense 16384", Partition.dense((128, 128)), 256, 256),
)


@dataclass(frozen=True)
class Case:
    """One binary that a shape launches on a target."""

    target: str
    shape: str
    problem: Problem
    launch: Launch

    @property
    def name(self) -> str:
        """A file name of its own."""
        return f"{self.shape} {self.problem.dtype} {self.launch.name}".replace(" ", "-") + f"-{self.launch.key[:6]}"


def cases(targets: Iterable[str], shapes: Iterable[Shape] = SHAPES, dtypes: Iterable[str] = ARITHMETIC) -> list[Case]:
    """Every launch of forward and backward with the tiles that the run time takes, for each target and shape."""
    found = []
    for target in targets:
        for shape in shapes:
            for dtype in dtypes:
                if (dtype == "float16" and not shape.fp16) or (dtype == "tf32" and not target.startswith("sm_")):
                    continue
                problem = shape.problem(dtype)
                found += [Case(target, shape.name, problem, launch) for launch in _launches(target, problem)]
    return found


def _launches(target: str, problem: Problem) -> Iterator[Launch]:
    wanted = problem.key_width, problem.value_width, problem.dtype, problem.partition.tokens
    backward = tiles.backward(target, *wanted)
    with_lse = not in_one_kernel(backward, problem.partition)
    yield from forward_launches(target, problem, tiles.lookup(target, "forward", *wanted), with_lse)
    yield from backward_launches(target, problem, backward)


def offences(case: Case, binary: Binary) -> list[str]:
    """What a shipped binary must not be or do, as far as this one is or does it.

    A spill is an access to the stack: a stack that no instruction touches (AMD keeps what it spilled in accumulation
    registers and counts it all the same) costs nothing. IEEE fp32 may spill, for NVIDIA multiplies it on FMA units, out
    of registers; and fp32 loads may be narrow, for Triton loads tf32 as its matrix units want it, 4 bytes at a time.
    """
    dtype, nvidia = case.problem.dtype, case.target.startswith("sm_")
    limits, matrix = LIMITS[case.target], sum(binary.matrix.values())
    found = []
    if dtype != "float32" and binary.spill_accesses:
        found.append(f"spills {binary.spill_bytes} bytes ({binary.spill_accesses} accesses)")
    if binary.shared > limits.shared_of_program:
        found.append(f"wants {binary.shared} bytes of shared memory, there are {limits.shared_of_program}")
    if binary.tensor_columns > limits.tensor_columns:
        found.append(f"wants {binary.tensor_columns} columns of tensor memory, there are {limits.tensor_columns}")
    if not found and not binary.programs:
        found.append(f"not one program of {binary.warps} warps with {binary.registers} registers fits")
    if not any(access.store for access in binary.accesses):
        found.append("stores nothing: an empty or trapping kernel")
    elif not matrix and (dtype != "float32" or not nvidia):
        found.append("multiplies without the matrix units")
    if dtype == "float32" and (matrix if nvidia else any("xf32" in kind for kind in binary.matrix)):
        found.append("multiplies fp32 as tf32")  # matrix units of NVIDIA's know no other
    if binary.atomics:
        found.append(f"has {binary.atomics} atomic instructions: its sums are not deterministic")
    aligned = case.problem.key_width % 8 == case.problem.value_width % 8 == 0
    narrow = [access for access in binary.accesses if access.rows and not access.store and access.width < 16]
    if aligned and narrow and case.problem.itemsize == 2:
        found.append(f"loads rows {_widths(narrow)} bytes at a time")
    return found


class Verifier:
    """Compiles and reads binaries, each once: facts are kept in a folder, by the hash of all that they depend on."""

    def __init__(self, cache: Path, dump: Path | None = None) -> None:
        self.cache, self.dump = cache, dump

    def known(self, case: Case) -> Binary | None:
        """The facts, if an earlier run has left all that is asked for."""
        file = self._file(case)
        return _binary(json.loads(file.read_text())) if file.exists() and self.dump is None else None

    def __call__(self, case: Case) -> Binary | str:
        """The facts, or why there is no binary."""
        try:
            kernel = compile_launch(case.launch, self.cache / "triton")
        except Exception as error:  # whatever a compiler throws is a finding, and the other cases go on
            return f"does not compile: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
        if self.dump is not None:
            _dump(kernel, self.dump / case.target / case.name)
        facts, file = read(kernel), self._file(case)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(asdict(facts)))
        os.replace(temporary, file)
        return facts

    def _file(self, case: Case) -> Path:
        return self.cache / "facts" / case.target / f"{_READER}-{case.launch.key}.json"


_READERS = (assembly, flow, program, reader)
_READER = hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in _READERS)).hexdigest()[:8]


def _binary(facts: dict[str, Any]) -> Binary:
    return Binary(**{**facts, "accesses": tuple(Access(*access) for access in facts["accesses"])})


def _dump(kernel: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    binary, text = ("hsaco", "amdgcn") if "amdgcn" in kernel.asm else ("cubin", "sass")
    path.with_name(f"{path.name}.{binary}").write_bytes(kernel.asm[binary])
    path.with_name(f"{path.name}.{text}").write_text(disassembly(kernel))


@dataclass(frozen=True)
class Verdict:
    case: Case
    binary: Binary | None
    offences: list[str]

    def as_dict(self) -> dict[str, Any]:
        problem, binary = self.case.problem, self.binary
        return {
            "target": self.case.target,
            "shape": self.case.shape,
            "key_width": problem.key_width,
            "value_width": problem.value_width,
            "heads": problem.heads,
            "tokens": problem.partition.tokens,
            "bias": problem.bias,
            "dtype": problem.dtype,
            "kernel": self.case.launch.name,
            "key": self.case.launch.key,
            "grid": self.case.launch.grid,
            **({} if binary is None else asdict(binary)),
            "accesses": [] if binary is None else [access._asdict() for access in binary.accesses],
            "offences": self.offences,
        }


def verify(
    verifier: Verifier, found: list[Case], jobs: int, advance: Callable[[], None] = lambda: None
) -> list[Verdict]:
    """Compile and judge every case, `jobs` at a time; cases with one binary share it. Calls `advance` after each."""
    distinct = {case.launch.key: case for case in found}
    results: dict[str, Binary | str] = {}
    pending: dict[Future[Binary | str], str] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:  # starts nobody where all is known
        for key, case in distinct.items():
            if known := verifier.known(case):
                results[key] = known
                advance()
            else:
                pending[pool.submit(verifier, case)] = key
        for done in as_completed(pending):
            results[pending[done]] = done.result()
            advance()
    verdicts = []
    for case in found:
        result = results[case.launch.key]
        wrong = [result] if isinstance(result, str) else offences(case, result)
        verdicts.append(Verdict(case, None if isinstance(result, str) else result, wrong))
    return verdicts


def table(target: str, verdicts: Iterable[Verdict]) -> Table:
    """A line for each binary that a shape launches."""
    columns = ("shape", "dtype", "kernel", "warps", "regs", "spills", "shared", "tmem", "programs", "matrix",
               "row loads", "row stores", "other loads", "other stores")  # fmt: skip
    units = (
        "spills: bytes of stack / accesses; programs: at a time on a multiprocessor; loads, stores: bytes x how many"
    )
    result = Table(title=f"{target}   ({units})", title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        result.add_column(column, no_wrap=True, justify="left" if column in ("shape", "dtype", "kernel") else "right")
    for verdict in verdicts:
        case, binary = verdict.case, verdict.binary
        name = case.launch.name.removesuffix("_kernel")
        style = "red" if verdict.offences else None
        if binary is None:
            result.add_row(case.shape, case.problem.dtype, name, "-", style=style)
            continue
        kinds = [(store, rows) for rows in (True, False) for store in (False, True)]
        widths = [_widths(a for a in binary.accesses if (a.store, a.rows) == kind) for kind in kinds]
        result.add_row(
            case.shape, case.problem.dtype, name, str(binary.warps), str(binary.registers),
            f"{binary.spill_bytes}/{binary.spill_accesses}" if binary.spill_bytes or binary.spill_accesses else "0",
            f"{binary.shared / 1024:.0f}K", str(binary.tensor_columns or "-"), str(binary.programs),
            " ".join(f"{kind} x{n}" for kind, n in binary.matrix.items()) or "none", *widths, style=style,
        )  # fmt: skip
    return result


def _widths(accesses: Iterable[Access]) -> str:
    widths = sorted(((a.width, a.times) for a in accesses), reverse=True)
    return " ".join(f"{'tensor' if width == TENSOR_COPY else width}x{count}" for width, count in widths) or "-"
