"""What commands say: every format says the same rows, and tables fit the terminal."""

import argparse
import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from bench.terminal import FORMATS, Table, Terminal

TABLE = Table(
    "Costs",
    ("map", "head", "GFLOPs", "ms", "MiB"),
    [["64x64", "ISA", "1.50", 12, None], ["64x64", "SA", "3.25", 34, 5], [], ["64x128", "ISA", "9.75", 56, 6]],
    words=2,
)
ROWS = [row for row in TABLE.rows if row]


def shown(format_: str, capsys: pytest.CaptureFixture[str]) -> str:
    terminal = Terminal(argparse.Namespace(format=format_, verbose=False))
    terminal.show(TABLE)
    terminal.end("ISA is cheaper.", Path("out/costs.csv"))
    out, err = capsys.readouterr()
    assert "ISA is cheaper.\nWrote out/costs.csv\n" in (out if format_ == "table" else err)
    assert "cheaper" not in out or format_ == "table"
    return out


def test_json_holds_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    (table,) = json.loads(shown("json", capsys))
    assert table == {"title": "Costs", "rows": [dict(zip(TABLE.header, row, strict=True)) for row in ROWS]}


def test_csv_holds_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    title, *lines = csv.reader(io.StringIO(shown("csv", capsys)))
    assert title == ["# Costs"]
    assert lines == [list(TABLE.header), *([("" if cell is None else str(cell)) for cell in row] for row in ROWS)]


def test_markdown_holds_the_rows(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in shown("markdown", capsys).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert set("".join(cells.pop(1))) == {"-"}
    assert cells == [list(TABLE.header), *([("-" if cell is None else str(cell)) for cell in row] for row in ROWS)]


def test_a_terminal_leaves_out_words_that_the_row_above_says(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split() for line in shown("table", capsys).splitlines()]
    assert ["64x64", "ISA", "1.50", "12", "-"] in lines
    assert ["SA", "3.25", "34", "5"] in lines
    assert ["64x128", "ISA", "9.75", "56", "6"] in lines


@pytest.mark.parametrize("format_", ["csv", "json", "markdown"])
def test_what_is_read_on_is_whole_on_the_narrowest_terminal(
    format_: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = shown(format_, capsys)
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, as rich sees it
    monkeypatch.setenv("COLUMNS", "12")
    assert Terminal()._tables.width == 12
    assert shown(format_, capsys).rstrip() == elsewhere.rstrip()


@pytest.mark.parametrize("width", [16, 28, 80])
def test_a_table_wider_than_the_terminal_goes_on_below_with_its_words(width: int) -> None:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    parts = list(TABLE.parts(console))
    seen = [[str(column.header) for column in part.columns] for part in parts]
    assert all(names[:2] == ["map", "head"] for names in seen)
    assert [name for names in seen for name in names[2:]] == ["GFLOPs", "ms", "MiB"]  # each once, in order
    for part in parts:
        assert len(part.columns) == 3 or console.measure(part).minimum <= width
    assert len(parts) == {16: 3, 28: 2, 80: 1}[width]


def test_details_are_for_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (False, True):
        Terminal(argparse.Namespace(format="table", verbose=verbose)).detail("dense, 512x512: would need 60 GB")
    assert capsys.readouterr().out.count("60 GB") == 1


@pytest.mark.parametrize("format_", FORMATS)
def test_progress_leaves_no_trace_among_the_tables(format_: str, capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal(argparse.Namespace(format=format_)).progress("rows", 3) as bar:
        bar.now("64x64")
        bar.advance()
    assert capsys.readouterr().out.strip() == ""


def test_a_bar_grows_by_what_is_still_to_come() -> None:
    with Terminal().progress("rows") as bar:
        assert bar.progress.tasks[0].total is None
        bar.expect(3)
        bar.advance()
        bar.expect(2)
        assert (bar.progress.tasks[0].completed, bar.progress.tasks[0].total) == (1, 5)
