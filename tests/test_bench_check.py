"""The check sees what is wrong, and its groups are the library's."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from bench import check
from bench.__main__ import main
from bench.cases import Case
from bench.check import named_cases
from isa_triton.backend.kernels import launch
from reference.budget import allowed_error

FEW = [
    Case("interlaced", (5, 7), (2, 3), (16, 24), heads=2),
    Case("local", (4, 7), (2, 3), (39, 16), bias=True, dtype=torch.float16),
    Case("dense", (7, 13), (7, 13), (16, 16)),
]


def run(path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[dict[str, str]]:
    """The rows that `bench check` writes; the named cases are a few small ones."""
    monkeypatch.setattr(check, "named_cases", lambda large: FEW)
    try:
        main(["check", "--out", str(path), *arguments])
    finally:
        rows = list(csv.DictReader((path / "check.csv").read_text().splitlines()))
    return rows


@pytest.mark.slow
def test_both_backends_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(tmp_path, monkeypatch)
    assert "6 cases, 0 beyond the error budget" in capsys.readouterr().out.replace("\n", "")
    assert [row["case"] for row in rows] == 2 * [str(case) for case in FEW]
    assert all(0 <= float(row[name]) <= 1 for row in rows for name in ("out", "lse", "dq", "dk", "dv"))
    assert [bool(row["dbias"]) for row in rows] == 2 * [False, True, False]
    assert rows[0]["forward_ms"] == ""  # the interpreter's time says nothing


def test_drawn_cases_are_counted_and_differ_with_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = [run(tmp_path, monkeypatch, "--backends", "eager", "--cases", "20", "--seed", seed) for seed in "123"]
    assert [len(rows) for rows in drawn] == [20, 20, 20]
    assert drawn[0] != drawn[1] != drawn[2]


@pytest.mark.slow
def test_a_wrong_kernel_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = launch.forward
    monkeypatch.setattr(launch, "forward", lambda *args: forward(*args[:6], args[6] * 1.01, *args[7:]))  # the scale
    with pytest.raises(SystemExit) as failure:
        run(tmp_path, monkeypatch, "--backends", "triton")
    assert failure.value.code == 1


def test_what_is_wrong_is_shrunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "errors", lambda case, *_: {"out": 2.0 * (case.size[1] > 3)})
    with pytest.raises(SystemExit) as failure:
        run(tmp_path, monkeypatch, "--backends", "eager", "--cases", "30")
    assert failure.value.code == 1
    assert "size=(1, 4)" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("large", [False, True])
def test_cases_cover_every_kind_and_their_groups_are_the_partition_s(large: bool) -> None:
    found = named_cases(large)
    assert {case.kind for case in found} == {"interlaced", "grid", "local", "rows", "columns", "dense"}
    assert {case.partition.divides for case in found} == {case.bias for case in found} == {False, True}
    for case in {(case.kind, case.size): case for case in found}.values():
        assert sum(1 for _ in case.groups()) == case.partition.groups
        for group, (rows, columns) in enumerate(case.groups()):
            y, x = torch.arange(case.size[0])[rows], torch.arange(case.size[1])[columns]
            assert bool((case.partition.seat(y[:, None], x)[0] == group).all())


def test_the_budget_is_the_eager_error_and_roundings() -> None:
    exact = torch.tensor([2.0, -4.0], dtype=torch.float64)
    eps = torch.finfo(torch.float16).eps
    eager = (exact + 0.5).half()
    assert allowed_error("out", exact, eager, torch.float16) == pytest.approx(2 * 0.5 + 16 * eps)
    assert allowed_error("dq", exact, eager, torch.float16, natural=3.0) == pytest.approx(3 * 0.5 + 28 * eps)
    assert allowed_error("dq", exact, eager, torch.float16, uncertain=0.1) == pytest.approx(1.5 + 16 * eps + 0.8)
