"""The tile files say something about every problem, and the look-up finds it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import triton

from isa_triton import tiles
from isa_triton.tiles import BackwardTiles, Tile

TARGETS = sorted(path.stem for path in tiles.FOLDER.glob("*.json"))
ALWAYS = ("forward", "queries", "keys", "pairs")  # steps that every group may need


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of tile files to look up in, instead of the shipped one."""
    monkeypatch.setattr(tiles, "FOLDER", tmp_path)
    looked_up = tiles._lookup, tiles._entries, tiles._warn
    for cached in looked_up:
        cached.cache_clear()
    yield tmp_path
    for cached in looked_up:
        cached.cache_clear()


def entry(step: str, key: int | None, value: int | None, tokens: int | None, tile: Tile) -> dict[str, object]:
    widths = {"key_width": key, "value_width": value, "tokens": tokens}
    return {"step": step, "arithmetic": "16-bit", **widths, "tile": list(tile)}


def test_every_supported_target_has_a_file() -> None:
    assert {"sm_80", "sm_86", "sm_90", "sm_100", "gfx942", "gfx1100"} <= set(TARGETS)
    assert set(tiles.RELATIVES.values()) <= set(TARGETS)
    assert not set(tiles.RELATIVES) & set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_entries_are_well_formed(target: str) -> None:
    for e in tiles._entries(target):
        assert e["step"] in tiles.STEPS
        assert e["arithmetic"] in {*tiles.ARITHMETIC, *tiles.ARITHMETIC.values()}
        if e["tile"] is None:
            assert e["step"] in ("group", "columns", "values")
            continue
        tile = Tile(*e["tile"])
        assert all(n >= 16 and n & (n - 1) == 0 for n in tile[:4]), e
        assert tile.num_warps in (1, 2, 4, 8, 16)
        assert 1 <= tile.num_stages <= 5
        if e["step"] == "group":
            assert e["tokens"] <= tile.block_m == tile.block_n
        if e["step"] == "columns":  # all queries in a block, with all of their width
            assert e["tokens"] <= tile.block_m
            assert (e["key_width"], e["value_width"]) <= (tile.block_k, tile.block_v)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.slow
def test_every_problem_is_served(target: str) -> None:
    widths = (1, 24, 32, 39, 64, 80, 256, 512, 1000)
    for dtype, key, value, tokens in product(tiles.ARITHMETIC, widths, widths, (1, 49, 64, 144, 256, 300, 16384)):
        for step in ALWAYS:
            assert isinstance(tiles.lookup(target, step, key, value, dtype, tokens), Tile)


@pytest.mark.parametrize("target", TARGETS)
def test_small_groups_have_a_kernel_of_their_own(target: str) -> None:
    for dtype, (key, value), tokens in product(
        tiles.ARITHMETIC, [(32, 32), (39, 39), (64, 64), (256, 512)], (1, 49, 64)
    ):
        if (target, dtype, key) in (("sm_80", "tf32", 39), ("sm_86", "tf32", 39)):
            continue  # 4-byte loads: no single kernel does without a spill
        if (target, tiles.ARITHMETIC[dtype], key, tokens > 32) == ("gfx1100", "16-bit", 32, True):
            continue  # nor does one for windows with a bias, in 256 registers a thread
        group = tiles.backward(target, key, value, dtype, tokens).group
        assert group is not None
        assert group.block_m >= tokens
    assert tiles.backward(target, 256, 512, "bfloat16", 4096).group is None


@pytest.mark.parametrize("target", TARGETS)
def test_sixty_four_tokens_are_one_block_of_keys(target: str) -> None:
    for key, value in [(32, 32), (39, 39), (64, 64), (256, 512)]:
        assert tiles.lookup(target, "forward", key, value, "bfloat16", 64).block_n >= 64


def test_the_smallest_entry_that_is_large_enough_is_taken(files: Path) -> None:
    small, wide, long, any_ = (Tile(16, 16, 16, 16, warps, 1) for warps in (1, 2, 4, 8))
    (files / "sm_90.json").write_text(
        json.dumps([
            entry("forward", None, None, None, any_),
            entry("forward", 32, 32, None, long),
            entry("forward", 64, 64, 64, wide),
            entry("forward", 32, 32, 64, small),
        ])
    )  # fmt: skip
    found = [tiles.lookup("sm_90", "forward", *n[:2], "float16", n[2]) for n in
             [(32, 32, 64), (33, 1, 64), (32, 32, 65), (64, 64, 65), (1, 65, 1)]]  # fmt: skip
    assert found == [small, wide, long, any_, any_]


def test_an_entry_says_for_whom_it_was_made(files: Path) -> None:
    limits = [(32, 32, 64), (32, 64, None), (None, None, None)]
    tile = Tile(16, 16, 16, 16)
    (files / "sm_86.json").write_text(json.dumps([entry("forward", *limit, tile) for limit in limits]))

    def found(*sizes: int) -> tuple[str, bool]:
        key, value, tokens = sizes
        served = tiles.entry("sm_89", "forward", key, value, "float16", tokens)
        assert served.tile == tile
        return str(served), served.is_made_for(*sizes)

    assert found(32, 32, 64) == ("sm_86, K = 32, V = 32, 64 tokens", True)
    assert found(32, 32, 33) == ("sm_86, K = 32, V = 32, 64 tokens", True)
    assert found(32, 32, 32) == ("sm_86, K = 32, V = 32, 64 tokens", False)  # an entry of 32 tokens could be better
    assert found(31, 32, 64) == ("sm_86, K = 32, V = 32, 64 tokens", False)
    assert found(32, 64, 9) == ("sm_86, K = 32, V = 64, any tokens", True)
    assert found(32, 65, 64) == ("sm_86, K = any, V = any, any tokens", False)


def test_groups_of_up_to_sixteen_tokens_are_one_problem(files: Path) -> None:
    (files / "sm_90.json").write_text(json.dumps([entry("forward", 8, 8, 16, Tile(16, 16, 16, 16))]))
    for tokens in (1, 8, 16):
        assert tiles.entry("sm_90", "forward", 8, 8, "float16", tokens).is_made_for(8, 8, tokens)


def test_an_entry_of_the_dtype_goes_before_one_of_its_arithmetic(files: Path) -> None:
    both, own = Tile(16, 16, 16, 16, 4, 1), Tile(32, 32, 32, 32, 4, 1)
    entries = [entry("forward", 32, 32, 64, both), {**entry("forward", 32, 32, 64, own), "arithmetic": "float16"}]
    (files / "sm_90.json").write_text(json.dumps(entries))
    assert tiles.lookup("sm_90", "forward", 8, 8, "float16", 8) == own
    assert tiles.lookup("sm_90", "forward", 8, 8, "bfloat16", 8) == both


def test_an_entry_for_one_target_or_compiler_goes_before_one_for_all(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everyone, target, compiler, both = (Tile(16, 16, 16, 16, warps, 1) for warps in (1, 2, 4, 8))
    line = entry("forward", 32, 32, 64, everyone)
    others = {target: {"target": "sm_120"}, compiler: {"triton": "3.6"}, both: {"target": "sm_120", "triton": "3.9"}}
    lines = [line, *({**line, **only, "tile": list(tile)} for tile, only in others.items())]
    (files / "sm_86.json").write_text(json.dumps(lines))
    found = {}
    for installed in ("3.6", "3.8", "3.9"):
        monkeypatch.setattr(tiles, "_triton", lambda installed=installed: installed)
        tiles._lookup.cache_clear()
        for name in ("sm_86", "sm_120"):
            found[installed, name] = tiles.lookup(name, "forward", 8, 8, "float16", 8)
    assert found.pop(("3.6", "sm_120")) in (target, compiler)  # each is for it
    assert found == {
        ("3.6", "sm_86"): compiler, ("3.8", "sm_86"): everyone, ("3.8", "sm_120"): target,
        ("3.9", "sm_86"): everyone, ("3.9", "sm_120"): both,
    }  # fmt: skip


def test_an_entry_for_calls_without_a_bias_goes_before_one_for_all_there_and_nowhere_else(files: Path) -> None:
    everyone, without = Tile(16, 16, 16, 16, 4, 1), Tile(32, 32, 32, 32, 4, 1)
    lines = [entry("forward", 32, 32, 64, everyone), {**entry("forward", 32, 32, 64, without), "bias": False}]
    for order in (lines, lines[::-1]):
        (files / "sm_90.json").write_text(json.dumps(order))
        for cached in (tiles._lookup, tiles._entries):
            cached.cache_clear()
        assert tiles.lookup("sm_90", "forward", 8, 8, "float16", 8) == everyone
        assert tiles.lookup("sm_90", "forward", 8, 8, "float16", 8, bias=True) == everyone
        assert tiles.lookup("sm_90", "forward", 8, 8, "float16", 8, bias=False) == without
    of_dtype = {**lines[0], "arithmetic": "float16"}
    (files / "sm_86.json").write_text(json.dumps([of_dtype, *lines]))
    assert tiles.lookup("sm_86", "forward", 8, 8, "float16", 8, bias=False) == without
    (files / "sm_80.json").write_text(json.dumps(lines[1:]))
    with pytest.raises(LookupError):
        tiles.lookup("sm_80", "forward", 8, 8, "float16", 8)


def test_dq_dk_and_dv_at_once_are_a_field_of_the_backward_tiles(files: Path) -> None:
    tile, columns = Tile(64, 64, 32, 32), Tile(256, 64, 64, 64, 8)
    lines = [entry(step, 64, 64, None, tile) for step in ("queries", "keys", "pairs")]
    lines.append({**entry("columns", 64, 64, 256, columns), "bias": False})
    (files / "sm_90.json").write_text(json.dumps(lines))
    for tokens, bias, found in ((256, False, columns), (256, True, None), (257, False, None)):
        served = tiles.backward("sm_90", 64, 64, "bfloat16", tokens, bias)
        assert served == BackwardTiles(None, tile, tile, None, tile, found)


def test_the_compiler_that_is_installed_is_known() -> None:
    assert triton.__version__.startswith(f"{tiles._triton()}.")


def test_a_limit_of_one_is_one(files: Path) -> None:
    (files / "sm_90.json").write_text(json.dumps([entry("forward", 1, 1, 1, Tile(16, 16, 16, 16))]))
    assert tiles.lookup("sm_90", "forward", 1, 1, "float16", 1) == Tile(16, 16, 16, 16)
    with pytest.raises(LookupError, match="'forward' for groups of 2 tokens"):
        tiles.lookup("sm_90", "forward", 1, 1, "float16", 2)


def test_backward_leaves_out_what_does_not_serve(files: Path) -> None:
    tile = Tile(64, 64, 32, 32)
    steps = [(step, 64 if step == "group" else None) for step in ("group", "queries", "keys", "pairs")]
    (files / "sm_90.json").write_text(json.dumps([entry(step, 64, 64, tokens, tile) for step, tokens in steps]))
    assert tiles.backward("sm_90", 64, 64, "bfloat16", 64) == BackwardTiles(tile, tile, tile, None, tile)
    assert tiles.backward("sm_90", 64, 64, "bfloat16", 65) == BackwardTiles(None, tile, tile, None, tile)
    with pytest.raises(LookupError, match="'group'"):
        tiles.lookup("sm_90", "group", 64, 64, "bfloat16", 65)


MODEST = {"sm_75": "sm_86", "xpu": "sm_86", "gfx908": "gfx942", "gfx1030": "gfx1100"}  # unknown, and whose tiles serve


def write_modest_files(folder: Path) -> dict[str, Tile]:
    """A file for each architecture that serves unknown ones; the tile of its one entry."""
    found = {name: Tile(16 << n, 16, 16, 16) for n, name in enumerate(sorted({*MODEST.values()}))}
    for name, tile in found.items():
        lines = [entry(step, None, None, None, tile) for step in tiles.STEPS]
        (folder / f"{name}.json").write_text(json.dumps(lines))
    return found


def test_an_unknown_target_is_served_by_the_most_modest_of_its_kind(files: Path) -> None:
    modest = write_modest_files(files)
    for target, nearest in MODEST.items():
        with pytest.warns(UserWarning, match=f"{target}, those of {nearest}"):
            assert tiles.lookup(target, "forward", 8, 8, "float16", 8) == modest[nearest]


def test_an_unknown_target_warns_once_a_process(files: Path) -> None:
    write_modest_files(files)
    with pytest.warns(UserWarning, match="sm_75"):
        tiles.backward("sm_75", 8, 8, "float16", 8)
    with warnings.catch_warnings(action="error"):
        tiles.lookup("sm_75", "forward", 8, 8, "float16", 9)
        tiles.entry("sm_75", "queries", 8, 8, "bfloat16", 8)
        for cached in (tiles._lookup, tiles._entries):  # as a search does when it has written a file
            cached.cache_clear()
        tiles.lookup("sm_75", "forward", 8, 8, "float16", 8)
        tiles.lookup("sm_89", "forward", 8, 8, "float16", 8)  # a relative of sm_86
        tiles.lookup("gfx90a", "forward", 8, 8, "float16", 8)
    with pytest.warns(UserWarning, match="sm_70"):
        tiles.lookup("sm_70", "forward", 8, 8, "float16", 8)


def test_the_warning_names_the_line_that_looks_up(files: Path) -> None:
    write_modest_files(files)
    with warnings.catch_warnings(record=True, action="always") as caught:
        tiles.entry("sm_75", "forward", 8, 8, "float16", 8)
        tiles.lookup("sm_72", "forward", 8, 8, "float16", 8)
        tiles.backward("sm_70", 8, 8, "float16", 8)
    assert [warning.filename for warning in caught] == [__file__] * 3


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'backward'"):
        tiles.lookup("sm_90", "backward", 8, 8, "float16", 8)
    with pytest.raises(ValueError, match="'float64'"):
        tiles.lookup("sm_90", "forward", 8, 8, "float64", 8)
