"""``python -m bench models``: errors, bytes and times of accelerated networks, counted right and written whole."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from bench import models
from bench.__main__ import main
from bench.models import exact, memory
from bench.models.networks import NETWORKS, Network
from bench.models.zoo import Entry, entries
from isa_triton.models import accelerate

TINY = {"img_size": 56, "depths": (2,), "embed_dim": 16, "num_heads": (2,), "num_classes": 3}
SWIN = Network(
    "timm",
    "tiny",
    partial(timm.create_model, "swin_tiny_patch4_window7_224", dynamic_img_size=True, **TINY),
    3,
    ((56, 56), (84, 112)),
    (56, 56),
)


def plain(make: Callable[[], nn.Module]) -> Network:
    return replace(SWIN, name="plain", make=make)


def test_bytes_and_flops_are_those_of_operators_by_hand() -> None:
    """A product, a sum in place and a view: read and written once each; the input is made before anybody counts."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.reshape(3, 8 * 9).T @ self.weight.T).relu_().T[None]

    counted = memory.count(plain(Two), (8, 9), training=False, ours=False)
    x, weight, y = 3 * 72, 15, 72 * 5
    assert counted.flops == 2 * 72 * 3 * 5
    assert counted.moved_bytes == 4 * (x + weight + y) + 4 * y  # relu_ has one tensor, which it reads and writes
    assert counted.peak_bytes == 4 * (x + weight + y)
    assert counted.seconds == pytest.approx(counted.moved_bytes / memory.GPU.dram)


def test_an_accelerated_network_moves_and_holds_less() -> None:
    rows = memory.rows(SWIN)
    assert [(row.size, row.pass_, row.who) for row in rows[:4]] == [
        ("56x56", "forward", "original"), ("56x56", "forward", "accelerated"),
        ("56x56", "training", "original"), ("56x56", "training", "accelerated"),
    ]  # fmt: skip
    for theirs, ours in zip(rows[::2], rows[1::2], strict=True):
        assert ours.moved_bytes < theirs.moved_bytes
        assert ours.predicted_ms < theirs.predicted_ms
        assert 0.9 * theirs.flops < ours.flops < 1.01 * theirs.flops  # no pair that a mask would forbid
    assert rows[7].peak_bytes < rows[6].peak_bytes


def test_a_wrong_network_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias of positions that is half of what it is, in the output and in the gradient that it has."""
    entry: Entry = entries("timm")[1]

    def wrong(model: nn.Module, **options: str) -> nn.Module:
        for name, parameter in accelerate(model, **options).named_parameters():
            if "relative_position_bias_table" in name:
                parameter.data *= 0.5
        return model

    assert exact.compare(entry, entry.sizes[0]).output < 1e-12
    monkeypatch.setattr(exact, "accelerate", wrong)
    errors = exact.compare(entry, entry.sizes[0])
    assert min(errors.output, errors.gradient) > 1e-4


@pytest.mark.slow
def test_the_command_writes_all_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(NETWORKS, "swin_tiny_patch4_window7_224", SWIN)
    monkeypatch.setattr(models, "entries", lambda package: entries(package)[1:2])
    chosen = ["--packages", "timm", "--networks", "swin_tiny_patch4_window7_224", "--rounds", "1"]
    main(["models", *chosen, "--out", str(tmp_path)])
    said = capsys.readouterr().out
    parts = ("exact", "memory", "time")
    files = {part: list(csv.DictReader((tmp_path / f"models_{part}.csv").read_text().splitlines())) for part in parts}
    assert {name: len(rows) for name, rows in files.items()} == {"exact": 12, "memory": 8, "time": 8}
    assert all(float(row["output"]) < 1e-12 and float(row["gradient"]) < 1e-10 for row in files["exact"])
    assert [row["who"] for row in files["time"][:4]] == [
        "original", "original again", "accelerated", "accelerated again"
    ]  # fmt: skip
    assert (tmp_path / "models_memory.png").stat().st_size > 5000
    for part in ("12 passes: outputs within", "The original's peak of bytes is", "Accelerated networks are"):
        assert part in " ".join(said.split())


def test_a_package_that_is_missing_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(package: str) -> tuple[Entry, ...]:
        raise ImportError(f"{package} is not installed: pip install it")

    monkeypatch.setattr(models, "entries", missing)
    main(["models", "--parts", "exact", "--packages", "timm", "--out", str(tmp_path)])
    assert "timm is left out: timm is not installed: pip install it" in capsys.readouterr().out
