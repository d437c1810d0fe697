"""`python -m bench photograph`: the network runs on a photograph, and heads cost what closed forms say."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import pytest
import torch.nn.functional as F

from bench import measure
from bench.__main__ import main
from bench.compared.heads import head
from bench.photograph import WIDTHS, dense_as_published, photograph, step
from bench.workload import closed_form_score_bytes


def test_a_run_leaves_a_csv_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["photograph", "--sizes", "33x49", "--heads", "ISA", "SA", "none", "--rounds", "1", "--out", str(tmp_path)])
    with (tmp_path / "photograph.csv").open(newline="") as file:
        rows = {row["head"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["ISA", "SA", "none", "SA, scores in memory"]
    assert {(row["height"], row["width"], row["map_height"], row["map_width"]) for row in rows.values()} == {
        ("33", "49", "5", "7")
    }
    assert [bool(row["seconds"]) for row in rows.values()] == [True, True, True, False]
    assert all(float(row["network_seconds"]) > 0 for row in rows.values())
    assert [row["how"] for row in rows.values()] == ["clock", "clock", "clock", ""]
    assert rows["SA"]["flops"] == rows["SA, scores in memory"]["flops"]
    assert int(rows["none"]["flops"]) == 2 * 5 * 7 * 512 * (9 * WIDTHS[0] + WIDTHS[2])
    printed = capsys.readouterr().out
    assert " s at 33x49." in printed
    assert "SA, scores in memory" in printed


def test_bytes_of_a_head_are_those_of_its_scores_only_where_they_are_kept() -> None:
    height, width = 64, 128
    scores = closed_form_score_bytes(height * width, 4)
    shape = (1, WIDTHS[0], height, width)
    peaks = [
        measure.count(partial(step, make, shape))[1]
        for make in (partial(head, "ISA", *WIDTHS), partial(head, "SA", *WIDTHS), dense_as_published)
    ]
    assert peaks[0] < peaks[1] < scores < peaks[2]


def test_the_photograph_is_the_same_at_every_size() -> None:
    large, small = photograph((302, 256)), photograph((64, 96))
    assert large.shape == (1, 3, 302, 256)
    assert large.std() > 0.1
    assert F.mse_loss(F.interpolate(large, (64, 96), mode="area"), small) < 0.01 * large.var()


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--backbone", "resnet18"], "must be a network with bottlenecks"),
        (["--heads", "OCR"], "invalid choice: 'OCR'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["photograph", *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
