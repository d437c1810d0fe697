"""What a command says: tables in the format asked for, progress, and at the end what came out and where it lies.

With --format csv, json or markdown the standard output holds the tables and nothing else; the rest goes to stderr.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import rich.table
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

FORMATS = ("table", "csv", "json", "markdown")
UNBOUNDED = 1000  # the width of what is no terminal, but a file or a pipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How a command that shows tables shows them."""
    add = parser.add_argument
    add("--format", choices=FORMATS, default="table", help="of the tables on the standard output (default: table)")
    add("--verbose", action="store_true", help="also say what was left out and why, row by row")


@dataclass(frozen=True)
class Table:
    """Rows under a header, where None is a dash and a row of nothing a line between sections.

    Every row says all of itself; on a terminal, words that the row above says too are left out.

    Args:
        words: the columns of words, by name or the first so many; the others are numbers.
        styles: of the rows, as rich names them.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    words: int | Collection[str] = 1
    styles: Sequence[str | None] = ()

    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *filter(None, self.rows)])
        return f"# {self.title}\n{text.getvalue()}" if self.title else text.getvalue()

    def markdown(self) -> str:
        whole = Console(file=io.StringIO(), width=UNBOUNDED, color_system=None)
        with whole.capture() as text:
            whole.print(self.rendered(range(len(self.header)), box.MARKDOWN))
        return text.get()

    def as_dict(self) -> dict[str, object]:
        rows = [dict(zip(self.header, row, strict=True)) for row in self.rows if row]
        return {"title": self.title, "rows": rows}

    def rendered(self, columns: Sequence[int], frame: box.Box = box.SIMPLE_HEAD) -> rich.table.Table:
        """Some of the columns for the terminal."""
        of_words = self._of_words()
        made = rich.table.Table(box=frame, pad_edge=frame is box.MARKDOWN)
        for i in columns:
            numbers = i not in of_words
            made.add_column(self.header[i], justify="right" if numbers else "left", no_wrap=numbers)
        above: Sequence[object] = ()
        for row, style in zip_longest(self.rows, self.styles):
            if row:
                said = self._said_above(row, above) if frame is not box.MARKDOWN else 0
                made.add_row(*("" if i < said else _text(row[i]) for i in columns), style=style)
            elif frame is not box.MARKDOWN:  # which has no sections
                made.add_section()
            above = row
        return made

    def parts(self, console: Console) -> Iterator[rich.table.Table]:
        """The table, or where the terminal is narrower its columns in parts below each other, each after the words."""
        of_words = self._of_words()
        numbers = [i for i in range(len(self.header)) if i not in of_words]
        while True:
            shown = len(numbers)
            while shown > 1 and self._width(console, sorted({*of_words, *numbers[:shown]})) > console.width:
                shown -= 1
            yield self.rendered(sorted({*of_words, *numbers[:shown]}))
            numbers = numbers[shown:]
            if not numbers:
                return

    def _width(self, console: Console, columns: Sequence[int]) -> int:
        return Measurement.get(console, console.options.update(width=UNBOUNDED), self.rendered(columns)).minimum

    def _of_words(self) -> set[int]:
        words = self.header[: self.words] if isinstance(self.words, int) else self.words
        return {i for i, name in enumerate(self.header) if name in words}

    def _said_above(self, row: Sequence[object], above: Sequence[object]) -> int:
        """How many of the first words, less the last, the row above says too."""
        leading = len(self._of_words()) - 1
        same = (i for i in range(leading) if not above or row[i] != above[i])
        return max(next(same, leading), 0)


def _text(cell: object) -> str:
    return "-" if cell is None else escape(str(cell))  # brackets are markup to rich


class Terminal:
    """Where a command speaks.

    Args:
        args: with what `add_arguments` adds, where the command has it.
        quiet: says nothing: for the processes beside the first.
    """

    def __init__(self, args: argparse.Namespace | None = None, quiet: bool = False) -> None:
        self.format: str = getattr(args, "format", "table")
        self.verbose: bool = getattr(args, "verbose", False)
        self._tables = _console(quiet)
        self._beside = self._tables if self.format == "table" else _console(quiet, stderr=True)

    def show(self, *tables: Table) -> None:
        """Tables, in the format asked for."""
        if self.format == "json":
            self._print(json.dumps([each.as_dict() for each in tables], indent=1, default=str))
        elif self.format == "csv":
            self._print("\n".join(each.csv() for each in tables), end="")
        else:
            for each in tables:
                if each.title:
                    self._print(each.title)
                if self.format == "markdown":
                    self._print(each.markdown(), end="")
                else:
                    self._tables.print(*each.parts(self._tables))

    def _print(self, text: str, end: str = "\n") -> None:
        self._tables.print(text, soft_wrap=True, markup=False, end=end)

    def say(self, *lines: str, style: str | None = None) -> None:
        """Lines beside the tables."""
        for line in lines:
            self._beside.print(line, style=style, soft_wrap=True, markup=False)

    def detail(self, *lines: str) -> None:
        """What only --verbose says."""
        if self.verbose:
            self.say(*lines)

    def end(self, sentence: str, *paths: Path) -> None:
        """The last lines: what came out, and where it lies."""
        self.say(sentence, *([f"Wrote {', '.join(map(str, paths))}"] if paths else []))

    @contextmanager
    def progress(self, unit: str, total: float | None = None) -> Iterator[Bar]:
        """A bar over `total` units, "rows", with the time that has gone and is left, and what runs now."""
        done = MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        columns = TextColumn("{task.description}"), BarColumn(20), *done
        unseen = not self._beside.is_terminal  # a file wants no bar, and not the empty line that it leaves
        with Progress(*columns, console=self._beside, transient=True, disable=unseen) as progress:
            yield Bar(progress, progress.add_task("", total=total))


@dataclass(frozen=True)
class Bar:
    """A bar of `Terminal.progress`."""

    progress: Progress
    task: TaskID

    def now(self, what: str) -> None:
        """Says what runs now."""
        self.progress.update(self.task, description=what)

    def expect(self, units: int) -> None:
        """Says that there are so many more to come, where the total was not known at once."""
        self.progress.update(self.task, total=(self.progress.tasks[self.task].total or 0) + units)

    def advance(self, units: float = 1) -> None:
        self.progress.advance(self.task, units)


def _console(quiet: bool, stderr: bool = False) -> Console:
    made = Console(highlight=False, quiet=quiet, stderr=stderr)
    if not made.is_terminal:
        made.width = UNBOUNDED
    return made
