"""What a certificate is made of: rows, one an item, kept in certificate.json as soon as each is found."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench.records import write_text

Outcome = Literal["passed", "failed", "slower", "measured", "not run"]
Name = tuple[str, ...]  # of an item: what its part's columns say


class Item(NamedTuple):
    """One thing that is looked at."""

    part: str  # its letter
    name: Name

    def __str__(self) -> str:
        return f"{self.part}: {', '.join(self.name)}"


class NotRun(Exception):
    """Why an item cannot be looked at on this machine."""


@dataclass(frozen=True)
class Found:
    """What came out: "measured" is a figure without a verdict, "not run" has a reason in `why`."""

    outcome: Outcome
    why: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0  # that the item took

    @classmethod
    def judged(cls, wrong: str, **figures: Any) -> Found:
        """Failed for what is wrong, passed where that is nothing."""
        return cls("failed" if wrong else "passed", wrong, figures)


@dataclass(frozen=True)
class Setting:
    """Where a certificate is made.

    Args:
        device: "cuda", "cuda:1" or "cpu", where kernels are interpreted and problems tiny.
        shapes: names of `bench.tiles.verify.SHAPES`.
        jobs: compilers at a time.
        cache: of binaries and their figures, as `bench tiles` keeps them.
    """

    device: str
    shapes: Sequence[str]
    jobs: int
    cache: str

    def __post_init__(self) -> None:
        """What comes from JSON becomes what it was."""
        object.__setattr__(self, "shapes", tuple(self.shapes))

    @property
    def interpreted(self) -> bool:
        from isa_triton.backend import triton

        return self.device.partition(":")[0] not in triton.DEVICES


class Certificate:
    """The rows that there are, of runs under the same conditions.

    Args:
        path: certificate.json, written after every row.
        conditions: what rows depend on; those of a file found under others are forgotten.
    """

    def __init__(self, path: Path, conditions: dict[str, Any]) -> None:
        self.path, self.conditions = path, conditions
        self.rows: dict[Item, Found] = {}

    def read(self) -> bool:
        """Take the rows of an earlier run; False where the file is of other conditions, or no certificate."""
        try:
            kept = json.loads(self.path.read_text())
            if kept["conditions"] != self.conditions:
                return False
            self.rows = {Item(row.pop("part"), tuple(row.pop("name"))): Found(**row) for row in kept["rows"]}
        except FileNotFoundError:
            return True
        except (ValueError, TypeError, KeyError):
            return False
        return True

    def add(self, item: Item, found: Found) -> None:
        """A row, which is on the disk when this returns."""
        self.rows[item] = found
        rows = [{"part": item.part, "name": item.name, **asdict(found)} for item, found in self.rows.items()]
        write_text(self.path, json.dumps({"conditions": self.conditions, "rows": rows}, indent=1) + "\n")

    def of(self, part: str) -> dict[Name, Found]:
        """The rows of a part, by name."""
        return {item.name: found for item, found in self.rows.items() if item.part == part}


def left(items: Iterable[Item], certificate: Certificate) -> list[Item]:
    """The items that have no row yet."""
    return [item for item in items if item not in certificate.rows]
