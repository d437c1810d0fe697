"""Binaries: each compiled and read once, on as many processes as there are, and judged by what may not ship."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from bench.records import write_text
from bench.tiles import assembly, flow, program
from bench.tiles import read as reader
from bench.tiles.assembly import TENSOR_COPY
from bench.tiles.compile import Launch, compile_launch
from bench.tiles.read import LIMITS, Access, Binary, disassembly, read


def offences(launch: Launch, binary: Binary) -> list[str]:
    """What a shipped binary must not be or do, as far as this one is or does it.

    A spill is an access to the stack: a stack that no instruction touches (AMD keeps what it spilled in accumulation
    registers and counts it all the same) costs nothing. IEEE fp32 may spill, for NVIDIA multiplies it on FMA units, out
    of registers; and fp32 loads may be narrow, for Triton loads tf32 as its matrix units want it, 4 bytes at a time.
    """
    problem, nvidia = launch.problem, launch.target.startswith("sm_")
    dtype, limits, matrix = problem.dtype, LIMITS[launch.target], sum(binary.matrix.values())
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
    aligned = problem.key_width % 8 == problem.value_width % 8 == 0
    narrow = [access for access in binary.accesses if access.rows and not access.store and access.width < 16]
    if aligned and narrow and problem.itemsize == 2:
        found.append(f"loads rows {format_widths(narrow)} bytes at a time")
    return found


def format_widths(accesses: Iterable[Access]) -> str:
    """Bytes of a thread at once, and how many instructions access so many: 16x40 4x2."""
    widths = sorted(((a.width, a.times) for a in accesses), reverse=True)
    return " ".join(f"{'tensor' if width == TENSOR_COPY else width}x{count}" for width, count in widths) or "-"


class Verdict(NamedTuple):
    """What became of a launch."""

    launch: Launch
    binary: Binary | None  # None: it does not compile, which is its one offence
    offences: list[str]


@dataclass
class Binaries:
    """Compiles and reads launches, each binary once.

    Args:
        cache: the folder where facts of binaries are kept, by the hash of all that they depend on.
        pool: where compilers run.
        dump: a folder for each binary and its disassembly; with it everything is compiled again.
    """

    cache: Path
    pool: Executor
    dump: Path | None = None

    def verdicts(self, launches: Iterable[Launch], advance: Callable[[], object] = lambda: None) -> list[Verdict]:
        """What becomes of each launch, in their order; `advance` is called after each binary."""
        launches = list(launches)
        facts, pending = dict[str, Binary | str](), dict[Future[Binary | str], str]()
        for key, launch in {launch.key: launch for launch in launches}.items():
            if (known := self.known(launch)) is not None:
                facts[key] = known
                advance()
            else:
                pending[self.pool.submit(compile_and_read, launch, self.cache, self.dump)] = key
        for done in as_completed(pending):
            facts[pending[done]] = done.result()
            advance()
        return [_verdict(launch, facts[launch.key]) for launch in launches]

    def known(self, launch: Launch) -> Binary | None:
        """The facts, if an earlier run has left all that is asked for."""
        file = _file(self.cache, launch)
        return Binary(**json.loads(file.read_text())) if self.dump is None and file.exists() else None


def _verdict(launch: Launch, facts: Binary | str) -> Verdict:
    if isinstance(facts, str):
        return Verdict(launch, None, [facts])
    return Verdict(launch, facts, offences(launch, facts))


def compile_and_read(launch: Launch, cache: Path, dump: Path | None = None) -> Binary | str:
    """The facts of a launch's binary, which are also kept in `cache`; or why there is no binary."""
    try:
        kernel = compile_launch(launch, cache / "triton")
    except Exception as error:  # whatever a compiler throws is a finding, and the other launches go on
        return f"does not compile: {type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    if dump is not None:
        folder, problem = dump / launch.target, launch.problem
        name = f"{problem.name} {problem.dtype} {launch.name} {launch.key[:6]}".replace(" ", "-")
        binary, text = ("hsaco", "amdgcn") if "amdgcn" in kernel.asm else ("cubin", "sass")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.{binary}").write_bytes(kernel.asm[binary])
        (folder / f"{name}.{text}").write_text(disassembly(kernel))
    facts = read(kernel, launch.target)
    write_text(_file(cache, launch), json.dumps(asdict(facts)))
    return facts


_READERS = (assembly, flow, program, reader)
_READER = hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in _READERS)).hexdigest()[:8]


def _file(cache: Path, launch: Launch) -> Path:
    return cache / "facts" / launch.target / f"{_READER}-{launch.key}.json"
