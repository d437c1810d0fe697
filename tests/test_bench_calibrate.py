"""Published measurements, and how far predictions are from them: no further than they were."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from bench.tiles import calibrate
from bench.tiles.calibrate import GROUPS, HALVES, POINTS, SCORES, Point, points, scores
from bench.tiles.foreign import Tensor
from bench.tiles.program import Work
from bench.tiles.roofline import MACHINES, Prediction
from tests.compiling import run_compiling


def rows() -> list[dict[str, str]]:
    with POINTS.open(newline="") as file:
        return list(csv.DictReader(file))


def test_at_least_forty_measurements_are_scored_and_half_of_them_held_out() -> None:
    found = points()
    counts = [sum(point.half == half for point in found) for half in HALVES]
    assert sum(counts) == len(found) >= 40
    assert 0.4 < counts[1] / len(found) < 0.6
    assert {point.gpu.name for point in found} == {"A100", "H100", "B200"}


def test_every_other_point_of_a_source_is_held_out() -> None:
    kinds = {(row["source"], row["pass"], row["whose"]) for row in rows()}
    for kind in kinds:
        halves = [row["half"] for row in rows() if (row["source"], row["pass"], row["whose"]) == kind]
        assert halves == [HALVES[i % 2] for i in range(len(halves))]


def test_times_are_what_the_sources_print() -> None:
    """Four FLOPs a pair of tokens and channel forward, ten backward, as all the sources count them."""
    for row in rows():
        assert row["source"].startswith("https://")
        number, unit = row["as published"].split()
        items = int(row["maps"]) * (64 if row["partition"] == "local" else 1)
        per_pair = (10 if row["pass"] == "backward" else 4) * int(row["width"])
        flops = items * int(row["heads"]) * int(row["tokens"]) ** 2 * per_pair
        seconds = float(number) / 1e3 if unit == "ms" else flops / (1e12 * float(number))
        assert float(row["us"]) == pytest.approx(1e6 * seconds, rel=0.004)


def planted(half: str, whose: str) -> Point:
    return Point(half, whose, MACHINES["H100"], 1024, 64, 32, 16, False, 1e-3, "https://example.org")


def prediction(seconds: float) -> Prediction:
    return Prediction(seconds, "DRAM", {}, 1, Work(0, 0, 0, 1, 1), 0)


def test_errors_are_of_either_half_and_a_factor_is_fitted_to_one() -> None:
    found = [planted("fitted", "Triton"), planted("fitted", "Triton"), planted("held out", "FlexAttention")]
    scored = scores([*found, planted("held out", "FlashAttention-2"), planted("fitted", "FlashAttention-2")],
                    [prediction(ms * 1e-3) for ms in (0.5, 0.5, 0.6, 2.0, 1.0)])  # fmt: skip
    assert scored["Triton", "fitted"] == pytest.approx((2, 0.5, 0.5, 2.0, 0.0, 0.0))
    assert scored["Triton", "held out"] == pytest.approx((1, 0.4, 0.4, 2.0, 0.2, 0.2))
    assert scored["all", "held out"][:3] == pytest.approx((2, 0.7, 1.0))
    assert scored.keys() == SCORES.keys() == {(group, half) for group in GROUPS for half in HALVES}


def test_a_point_is_called_as_it_was_measured(compiling: None) -> None:
    point = planted("fitted", "Triton")
    for call in point.calls():
        assert call.arguments["q"] == Tensor("fp16", 16 * 32 * 1024 * 64)
        assert call.grid == (1024 // call.arguments["BLOCK_M"], 16 * 32)
        assert call.arguments["RAGGED"] is False
        assert call.arguments["bias"] is None
    ragged = [call for row in rows() if row["tokens"] == "144" for call in Point.read(row).calls()]
    assert ragged
    assert all(call.arguments["RAGGED"] and call.arguments["bias"] is not None for call in ragged)


@pytest.mark.slow
def test_predictions_are_no_further_from_what_was_measured_than_they_were(tmp_path: Path) -> None:
    out = tmp_path / "points.json"
    done = run_compiling("-m", "bench", "tiles", "calibrate", "--quick", "--cache", str(tmp_path), "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    line = r"^(\w+), ([\w ]+), \d+ points: .* off by ([\d.]+)% in the mean, ([\d.]+)% at worst"
    said = re.findall(line, done.stdout, re.MULTILINE)
    found = {(group, half): (float(mean) / 100, float(worst) / 100) for group, half, mean, worst in said}
    assert found.keys() == SCORES.keys()
    for key, (mean, worst) in found.items():
        assert mean <= SCORES[key][0] + 0.002
        assert worst <= SCORES[key][1] + 0.002
    assert len(json.loads(out.read_text())) == len(calibrate.points())
