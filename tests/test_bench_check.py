"""The check of the kernels sees what is wrong, and its groups are the library's; overhead runs every layer."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench.__main__ import main
from bench.budget import allowed_error
from bench.commands import check
from bench.commands.check import Case, cases
from isa_triton.kernels import launch

FEW = [
    Case("interlaced", (5, 7), (2, 3), (16, 24), heads=2),
    Case("local", (4, 7), (2, 3), (39, 16), bias=True, dtype=torch.float16),
    Case("dense", (7, 13), (7, 13), (16, 16)),
]


def checked(some: list[Case], path: Path) -> int:
    return check.check(some, "cpu", path / "check.csv", Console())


def test_the_kernels_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checked(FEW, tmp_path) == 0
    assert "3 cases, 0 beyond the error budget" in capsys.readouterr().out.replace("\n", "")
    rows = list(csv.DictReader((tmp_path / "check.csv").read_text().splitlines()))
    assert [row["case"] for row in rows] == [str(case) for case in FEW]
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("out", "lse", "dq", "dk", "dv"))
    assert [bool(row["dbias"]) for row in rows] == [False, True, False]
    assert rows[0]["forward_ms"] == ""  # the interpreter's time says nothing


def test_a_wrong_kernel_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = launch.forward
    monkeypatch.setattr(launch, "forward", lambda *args: forward(*args[:6], args[6] * 1.01, *args[7:]))  # the scale
    assert checked(FEW[:1], tmp_path) == 1


@pytest.mark.parametrize("large", [False, True])
def test_cases_cover_every_kind_and_their_groups_are_the_partition_s(large: bool) -> None:
    found = cases(large)
    assert {case.kind for case in found} == {"interlaced", "grid", "local", "rows", "columns", "dense"}
    assert {case.partition.divides for case in found} == {case.bias for case in found} == {False, True}
    for case in {(case.kind, case.size): case for case in found}.values():
        assert sum(1 for _ in case.groups()) == case.partition.groups
        for group, (rows, columns) in enumerate(case.groups()):
            first = rows.start, columns.start
            assert case.partition.coordinates(group, 0) == (*first, True)


def test_the_budget_is_the_eager_error_and_roundings() -> None:
    exact = torch.tensor([2.0, -4.0], dtype=torch.float64)
    eps = torch.finfo(torch.float16).eps
    eager = (exact + 0.5).half()
    assert allowed_error("out", exact, eager, torch.float16) == pytest.approx(2 * 0.5 + 16 * eps)
    assert allowed_error("dq", exact, eager, torch.float16, natural=3.0) == pytest.approx(3 * 0.5 + 19 * eps)
    assert allowed_error("dq", exact, eager, torch.float16, recomputed=0.1) == pytest.approx(1.5 + 16 * eps + 0.8)


def test_overhead_measures_every_layer(tmp_path: Path) -> None:
    main(["overhead", "--out", str(tmp_path), "--rounds", "2", "--calls", "2"])
    rows = list(csv.DictReader((tmp_path / "overhead.csv").read_text().splitlines()))
    assert [row["layer"] for row in rows if row["pass"] == "forward"][0::5] == [
        "bare Python call",
        "partitioned_attention: checks",
    ]
    assert all(float(row["microseconds"]) > 0 for row in rows)
