"""The files of tiles: what a search writes there is found, and goes before what is for fewer cases or for others."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from bench.tiles.options import make_problem
from bench.tiles.search import Finding, Task, needed, write
from isa_triton import tiles
from isa_triton.tiles import Tile
from tests.test_bench_tile_search import H100, TILE, finding


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the shipped files, which may be written to."""
    shutil.copytree(tiles.FOLDER, tmp_path / "tiles")
    monkeypatch.setattr(tiles, "FOLDER", tmp_path / "tiles")
    forget()
    yield tmp_path / "tiles"
    forget()


def forget() -> None:
    """What was looked up before."""
    for cached in (tiles._lookup, tiles._entries):
        cached.cache_clear()


def test_what_is_written_is_found(folder: Path) -> None:
    before = json.loads((folder / "sm_90.json").read_text())
    tile = Tile(64, 64, 16, 16, 2, 5)
    problem = make_problem(50, 80, 96)
    chosen = [
        Finding(Task(H100, problem, step), tile, None, [], None, measured=1e-5) for step in ("queries", "keys", "pairs")
    ]
    assert write(chosen) == folder / "sm_90.json"
    after = json.loads((folder / "sm_90.json").read_text())
    assert len(after) == len(before) + 5  # dv, which comes with dk, has a line too, and the one kernel, which is slower
    assert all(entry in after for entry in before)
    for step in ("queries", "keys", "pairs"):
        assert tiles.lookup("sm_90", step, 80, 96, "float16", 50) == tile
    for step in ("values", "group"):
        with pytest.raises(LookupError):
            tiles.lookup("sm_90", step, 80, 96, "float16", 50)
    assert {entry["evidence"]["how"] for entry in after if entry["tile"] == list(tile)} == {"measured"}
    write(chosen)
    assert json.loads((folder / "sm_90.json").read_text()) == after


@pytest.mark.parametrize("dtype", ["tf32", "bfloat16", "float32"])
def test_what_is_written_goes_before_what_the_dtype_had_to_itself(dtype: str, folder: Path) -> None:
    problem = make_problem(64, 80, 96, dtype=dtype)
    own = {"step": "forward", "arithmetic": dtype, "key_width": 80, "value_width": 96, "tokens": 64, "tile": [*TILE]}
    (folder / "sm_90.json").write_text(json.dumps([*json.loads((folder / "sm_90.json").read_text()), own]))
    assert tiles.lookup("sm_90", "forward", *problem.sizes) == TILE
    found = replace(finding("forward", 1, task=Task(H100, problem, "forward")), tile=TILE._replace(num_stages=5))
    write([found])
    assert tiles.lookup("sm_90", "forward", *problem.sizes) == found.tile


def test_what_is_written_goes_before_what_was_for_this_compiler_alone(folder: Path) -> None:
    problem, only = make_problem(64, 80, 96), {"triton": tiles._triton()}
    own = {"step": "forward", "arithmetic": "16-bit", "key_width": 80, "value_width": 96, "tokens": 64, "tile": [*TILE]}
    others = [{**own, "triton": "1.0"}, {**own, **only}]
    (folder / "sm_90.json").write_text(json.dumps([*json.loads((folder / "sm_90.json").read_text()), *others]))
    found = replace(finding("forward", 1, task=Task(H100, problem, "forward")), tile=TILE._replace(num_stages=5))
    write([found])
    assert tiles.lookup("sm_90", "forward", *problem.sizes) == found.tile
    written = json.loads((folder / "sm_90.json").read_text())
    assert others[0] in written
    assert others[1] not in written


def test_an_entry_goes_where_the_next_serves_with_the_same_tile(folder: Path) -> None:
    """Look-ups of every size, with a bias and without, are what they were, and no two entries in a row are alike."""
    dice, sizes = random.Random(0), [16, 20, 64, 100, 128, 256, 300, 4096]
    for _ in range(40):
        entries = [
            {"step": "forward", "arithmetic": "16-bit", "key_width": k, "value_width": k, "tokens": tokens,
             "tile": dice.choice([[16, 16, 16, 16, 4, 2], [32, 32, 32, 32, 4, 2]]), **only}
            for k in (32, None) for tokens in (16, 64, 128, 256, None) for only in ({}, {"bias": False})
            if dice.random() < 0.6 or (k, tokens, only) == (None, None, {})
        ]  # fmt: skip
        dice.shuffle(entries)
        found = []
        for kept in (entries, needed(entries)):
            (folder / "sm_90.json").write_text(json.dumps(kept))
            forget()
            found.append([tiles.lookup("sm_90", "forward", k, k, "float16", n, bias)
                          for k, n, bias in product((8, 32, 64), sizes, (True, False))])  # fmt: skip
        assert found[0] == found[1]
        assert all(entry in entries for entry in needed(entries))
        assert needed(needed(entries)) == needed(entries)
    same = [
        {**entries[0], "key_width": 8, "value_width": 8, "tokens": n, "tile": [16] * 4 + [4, 2]} for n in (16, 32, 64)
    ]
    plain = [{name: value for name, value in entry.items() if name != "bias"} for entry in same]
    assert needed(plain) == plain[2:]
    alone = {**plain[0], "triton": "1.0"}
    assert len(needed([*plain, alone])) == 4
