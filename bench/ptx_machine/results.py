"""What is written down of the machine's work; nothing here loads a kernel."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from bench.cases import NAMES

ROOT = Path(__file__).parents[2]
SURVIVED = "survived"
BESIDE = "command.py", "counted.py", "mutants.py", "results.py"  # what no result depends on


@dataclass(frozen=True)
class Row:
    """A line of the CSV: what ran, errors as parts of what is allowed, and how it ended; `fault` is empty if well."""

    target: str
    case: str
    arithmetic: str
    tiles: str
    shipped: int
    out: float | None
    lse: float | None
    dq: float | None
    dk: float | None
    dv: float | None
    dbias: float | None
    kernels: str
    launches: int
    instructions: int
    seconds: float
    fault: str
    notes: str
    made_by: str

    @property
    def worst(self) -> float:
        """The largest of the errors; not a number where one is not."""
        found = [error for name in NAMES if (error := getattr(self, name)) is not None]
        return max(found, key=lambda error: (error != error, error), default=0.0)

    @property
    def is_right(self) -> bool:
        return not self.fault and self.worst <= 1


@dataclass(frozen=True)
class MutantRow:
    """A line of the CSV of mutants: what was changed where, and what came of it."""

    target: str
    case: str
    arithmetic: str
    kernel: str
    change: str
    line: int
    before: str
    after: str
    outcome: str

    @property
    def survived(self) -> bool:
        return self.outcome == SURVIVED


@dataclass(frozen=True)
class Summary:
    """A line of ptx.csv: all checks of a target with a Triton, its cases or its shipped tiles."""

    target: str
    triton: str
    of: str  # "cases" or "shipped tiles"
    checks: int
    tiles: int
    launches: int
    instructions: int
    largest: float  # error, as a part of what is allowed
    beyond: int
    faults: int
    noted: int  # checks in which what Triton wrote is not as the PTX ISA has it

    @classmethod
    def of_rows(cls, target: str, of: str, tiles: int, rows: Sequence[Row]) -> Summary:
        """That of all rows of a target."""
        return cls(
            target, version("triton"), of, len(rows), tiles, sum(row.launches for row in rows),
            sum(row.instructions for row in rows), max(row.worst for row in rows),
            sum(not row.fault and not row.is_right for row in rows), sum(bool(row.fault) for row in rows),
            sum(bool(row.notes) for row in rows),
        )  # fmt: skip

    @property
    def key(self) -> tuple[str, str, str]:
        return self.target, self.triton, self.of

    @property
    def order(self) -> tuple[int, str, str]:
        return int(self.target.removeprefix("sm_")), self.triton, self.of


@cache
def made_by() -> str:
    """What the result of a check depends on beside the check: the sources, and Triton's version."""
    rooms = "bench/ptx_machine", "isa_triton/backend/kernels"
    files = sorted(path for room in rooms for path in (ROOT / room).glob("*.py") if path.name not in BESIDE)
    sources = b"".join(path.read_bytes() for path in files)
    return f"{hashlib.sha256(sources).hexdigest()[:12]} with triton {version('triton')}"
