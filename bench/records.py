"""Rows of results: dataclasses to a CSV and back, files that appear whole or not at all.

A column is a field's name less a last "_"; None is an empty cell.
"""

from __future__ import annotations

import csv
import glob
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")


def columns(kind: type[DataclassInstance]) -> list[str]:
    """The columns of a dataclass."""
    return [field.name.rstrip("_") for field in fields(kind)]


def write(path: Path, kind: type[Record], rows: Iterable[Record]) -> None:
    """Write the CSV of some rows of a kind, whole or not at all: a reader never sees half of it."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(columns(kind))
    lines.writerows([getattr(row, field.name) for field in fields(kind)] for row in rows)
    write_text(path, text.getvalue())


_TYPES: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "int | None": lambda text: int(text) if text else None,
    "float | None": lambda text: float(text) if text else None,
}


def read(path: Path, kind: type[Record]) -> list[Record]:
    """The rows of a CSV that `write` wrote; none where there is no such file.

    Raises:
        ValueError: the file is something else.
    """
    if not path.exists():
        return []
    types = [_TYPES.get(str(field.type), str) for field in fields(kind)]
    try:
        with path.open(newline="") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV: {error}") from error
    if header != columns(kind):
        raise ValueError(f"{path} must have the columns {','.join(columns(kind))}, got {','.join(header)}")
    records = []
    for number, line in enumerate(lines, 2):
        try:
            records.append(kind(*(type_(text) for type_, text in zip(types, line, strict=True))))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}, must hold one {','.join(columns(kind))}, got {line}: {error}"
            ) from error
    return records


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write in place of another, in folders made on the way: it becomes the other when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):  # by a process that was killed while it wrote
        if left.suffix[1:].isdecimal() and not _is_running(int(left.suffix[1:])):
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """Write a file, and the folders on the way to it: a reader never sees half of it."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def format_size(size: Sequence[int]) -> str:
    """A map or a partition size, height first: 64x128; of a volume depth first."""
    return "x".join(map(str, size))


def short(value: float) -> str:
    """Three digits or whole: 0.98, 51.2, 191."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"
