"""The kernels, interpreted, keep the error budget: named cases, one a feature; then every two features together."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

import pytest
import torch

from bench.cases import Case, Pair
from isa_triton.tiles import BackwardTiles, Tile
from tests.kernel_cases import FORMS, assert_within_budget, of_groups, tiles_of

pytestmark = pytest.mark.usefixtures("kernels")

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32

# What a case is about, how its groups are cut into blocks, and the case: tokens of a group, groups, missing pixels.
NAMED: dict[str, tuple[str, Case]] = {
    "windows": ("one block", of_groups("local", (3, 5), (2, 3))),
    "windows on a ragged map": ("one block", of_groups("local", (3, 5), (2, 3), (1, 2))),
    "windows of many blocks": ("many blocks", of_groups("local", (5, 10), (1, 2), (0, 1))),
    "shifted windows": ("one block", of_groups("local", (4, 8), (2, 2), (0, 3), shift=(1, 6), bias=True)),
    "shifted windows, a block of keys before the map": (
        "many blocks", of_groups("local", (4, 8), (2, 1), (1, 0), shift=(2, 0), bias=True)
    ),
    "interlaced": ("one block", of_groups("interlaced", (5, 3), (2, 3))),
    "interlaced on a ragged map": ("one block", of_groups("interlaced", (5, 3), (2, 3), (1, 2))),
    "interlaced, many blocks": ("many blocks", of_groups("interlaced", (7, 9), (2, 1), (1, 0))),
    "grid": ("one block", of_groups("grid", (4, 4), (3, 2))),
    "grid on a ragged map": ("many blocks", of_groups("grid", (5, 10), (1, 2), (0, 1))),
    "rows": ("one block", of_groups("rows", (1, 17), (2, 1))),
    "columns": ("many blocks", of_groups("columns", (50, 1), (1, 2))),
    "dense": ("many blocks", of_groups("dense", (5, 13), (1, 1))),
    "groups of one token": ("one block", of_groups("local", (1, 1), (2, 3))),
    "a block of queries meets all keys": ("whole groups", of_groups("local", (7, 9), (1, 2))),
    "dk and dv in passes of their own": ("many blocks, split", of_groups("local", (5, 10), (1, 2), bias=True)),
    "whole groups, dk and dv in passes of their own": (
        "whole groups, split", of_groups("interlaced", (5, 10), (1, 2), (0, 1))
    ),
    "dq, dk and dv at once": ("columns", of_groups("interlaced", (5, 10), (2, 3), (1, 0), heads=3, bias=True)),
    "dq, dk and dv at once, of shifted windows": (
        "columns", of_groups("local", (4, 8), (2, 2), (0, 3), (24, 39), shift=(1, 6), maps=3, dtype=BF16)
    ),
    "several heads and maps": ("one block", of_groups("local", (3, 5), (2, 1), heads=3, maps=2, bias=True)),
    "a bias": ("one block", of_groups("interlaced", (3, 5), (1, 2), (0, 1), bias=True)),
    "a bias over many blocks": ("many blocks", of_groups("interlaced", (5, 10), (1, 2), (0, 1), bias=True)),
    "fp16": ("one block", of_groups("local", (3, 5), (2, 1), dtype=HALF)),
    "bf16": ("many blocks", of_groups("local", (5, 10), (1, 2), dtype=BF16)),
    "widths that are no powers of two": ("many blocks", of_groups("local", (5, 10), (1, 2), widths=(24, 39))),
    "keys of one channel": ("one block", of_groups("local", (3, 5), (2, 1), widths=(1, 24))),
    "values of one channel": ("one block", of_groups("local", (3, 5), (2, 1), widths=(64, 1))),
    "wide heads": ("whole groups", of_groups("interlaced", (5, 5), (2, 1), (1, 0), (256, 512), dtype=HALF)),
    "NCHW": ("one block", of_groups("local", (3, 5), (2, 1), layout="nchw")),
    "heads first": ("many blocks", of_groups("local", (5, 10), (1, 2), heads=2, layout="heads_first")),
    "slices of larger tensors": ("one block", of_groups("local", (3, 5), (2, 1), layout="sliced")),
    "expanded inputs, the gradient of a sum": ("one block", of_groups("local", (3, 5), (2, 1), layout="expanded")),
    "scores of hundreds": ("many blocks", of_groups("local", (5, 10), (1, 2), logits=300.0)),
}  # fmt: skip


@pytest.mark.parametrize(("form", "case"), NAMED.values(), ids=NAMED)
def test_a_named_case_keeps_the_budget(form: str, case: Case) -> None:
    assert_within_budget(case, tiles_of(form, case.partition.tokens))


@pytest.mark.parametrize("blocks", [(16, 64), (16, 32), (32, 16)], ids=str)
def test_blocks_of_queries_and_keys_may_differ(blocks: Pair) -> None:
    """In the first all keys are one block, and the queries three."""
    case, tile = of_groups("interlaced", (5, 7), (2, 1), (1, 0), (24, 39), bias=True), Tile(*blocks, 32, 32)
    assert_within_budget(case, (tile, BackwardTiles(None, tile, tile, None, tile)))


# ------------------------------------------------------------------------------------- every two features together
SHAPES: dict[int, list[Pair]] = {  # of groups of so many tokens
    1: [(1, 1)], 15: [(3, 5), (5, 3)], 16: [(2, 8), (4, 4)], 17: [(1, 17), (17, 1)], 49: [(7, 7)], 50: [(5, 10)],
    63: [(7, 9)], 64: [(8, 8), (4, 16)], 65: [(5, 13)], 144: [(12, 12), (9, 16)], 256: [(16, 16)], 300: [(15, 20)],
}  # fmt: skip
KINDS = {  # partitions, and whether the map lacks pixels
    "windows": ("local", False), "windows on a ragged map": ("local", True),
    "interlaced": ("interlaced", False), "interlaced on a ragged map": ("interlaced", True),
    "grid": ("grid", False), "grid on a ragged map": ("grid", True),
    "rows": ("rows", False), "columns": ("columns", False), "dense": ("dense", False),
}  # fmt: skip
FEATURES: dict[str, list[Any]] = {
    "tokens": list(SHAPES),
    "kind": list(KINDS),
    "form": list(FORMS),
    "widths": [(32, 32), (24, 39), (64, 64), (1, 24), (39, 39), (80, 64), (32, 80), (64, 1)],
    "dtype": [FLOAT, HALF, BF16],
    "layout": ["contiguous", "nchw", "sliced", "heads_first", "expanded"],
    "bias": [False, True],
    "logits": [3.0, 30.0],
    "heads": [1, 3],
    "maps": [1, 2],
}
FEW_TOKENS = {"heads": 60, "maps": 17}  # with more tokens there is one head, or map: interpreted kernels are slow
DRAWS = 300
Row = dict[str, Any]  # a value of every feature


def pairs(row: Row) -> set[tuple[Any, ...]]:
    """All values of two features that meet in a row."""
    return set(combinations(row.items(), 2))


def crossed() -> Iterator[tuple[Row, Case]]:
    """Every number of tokens in every kind, in turns with every width.

    The other features are drawn: of many draws, the one in which most values meet that had not met before.
    """
    dice, met = random.Random(0), set[Any]()
    for (i, tokens), (j, kind) in product(enumerate(SHAPES), enumerate(KINDS)):
        widths, drawn = FEATURES["widths"][(i + j) % len(FEATURES["widths"])], []
        for _ in range(DRAWS):
            row = {name: dice.choice(values) for name, values in FEATURES.items()}
            row |= {"tokens": tokens, "kind": kind, "widths": widths}
            row |= {name: 1 for name, most in FEW_TOKENS.items() if tokens > most}
            drawn.append(row)
        row = max(drawn, key=lambda row: len(pairs(row) - met))
        met |= pairs(row)
        yield row, case_of(row, dice)


def case_of(row: Row, dice: random.Random) -> Case:
    """Few groups where there is much to do; a ragged map lacks as many pixels as leave something of every group."""
    kind, ragged = KINDS[row["kind"]]
    tokens, several = dice.choice(SHAPES[row["tokens"]]), [(2, 3), (3, 2), (1, 4)]
    if row["tokens"] > 100 or row["form"] != "one block" or row["heads"] * row["maps"] > 1:
        several = [(1, 2), (2, 1)]
    groups = dice.choice(several)
    short = (0, 0)
    if kind in ("rows", "columns"):
        tokens, groups = {"rows": ((1, row["tokens"]), (2, 1)), "columns": ((row["tokens"], 1), (1, 2))}[kind]
    elif kind == "dense":
        groups = (1, 1)
    elif ragged:
        short = min(tokens[0], groups[0], 3) - 1, min(tokens[1], groups[1], 3) - 1
    features = {name: row[name] for name in ("widths", "dtype", "layout", "bias", "logits", "heads", "maps")}
    return of_groups(kind, tokens, groups, short, **features)


CROSSED = list(crossed())
WIDE = [
    (form, of_groups("interlaced", (8, 8), (2, 1), (1, 0), (256, 512), dtype=dtype, layout=layout))
    for i, (dtype, form) in enumerate(product((FLOAT, HALF, BF16), FORMS[:4]))
    for layout in [("contiguous", "nchw")[i % 2]]
]
STEEP = [
    (form, of_groups("interlaced", (5, 10), (2, 1), short, (64, 32), bias=bias, dtype=dtype, logits=logits))
    for i, (bias, dtype, form, logits) in enumerate(
        product((False, True), (FLOAT, HALF, BF16), FORMS[:3], (300.0, 3000.0))
    )
    for short in [((0, 0), (1, 0))[i // 2 % 2]]
]
SHIFTED = [
    (form, of_groups("local", (4, 8), groups, short, (24, 39), bias=bias, dtype=dtype, shift=shift))
    for groups, short, shift in [((2, 1), (1, 0), (2, 0)), ((2, 2), (0, 3), (1, 6))]
    for form, dtype, bias in [
        ("one block", BF16, True), ("many blocks", FLOAT, True), ("many blocks, split", HALF, False)
    ]
]  # fmt: skip


def named(form_or_case: str | Case) -> str:
    return f"{form_or_case} {form_or_case.dtype}" if isinstance(form_or_case, Case) else form_or_case


@pytest.mark.slow
@pytest.mark.parametrize(("form", "case"), [(row["form"], case) for row, case in CROSSED], ids=named)
def test_every_two_features_together_keep_the_budget(form: str, case: Case) -> None:
    assert_within_budget(case, tiles_of(form, case.partition.tokens))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "case"), WIDE, ids=named)
def test_wide_heads_keep_the_budget(form: str, case: Case) -> None:
    assert_within_budget(case, tiles_of(form, case.partition.tokens))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "case"), STEEP, ids=named)
def test_large_logits_keep_the_budget(form: str, case: Case) -> None:
    assert_within_budget(case, tiles_of(form, case.partition.tokens))


@pytest.mark.slow
@pytest.mark.parametrize(("form", "case"), SHIFTED, ids=named)
def test_shifted_windows_keep_the_budget(form: str, case: Case) -> None:
    assert_within_budget(case, tiles_of(form, case.partition.tokens))


@pytest.mark.parametrize("two", list(combinations(FEATURES, 2)), ids=" and ".join)
def test_every_value_of_a_feature_meets_every_value_of_another(two: tuple[str, str]) -> None:
    met = {tuple(row[name] for name in two) for row, _ in CROSSED}
    expected = set(product(*(FEATURES[name] for name in two)))
    if two[0] == "tokens" and two[1] in FEW_TOKENS:
        expected = {(tokens, n) for tokens, n in expected if n == 1 or tokens <= FEW_TOKENS[two[1]]}
    assert met == expected


def test_the_cases_are_what_their_rows_promise() -> None:
    assert len(CROSSED) == len(SHAPES) * len(KINDS)
    assert [case.partition.tokens for _, case in CROSSED] == [row["tokens"] for row, _ in CROSSED]
    assert all(case.partition.divides for row, case in CROSSED if not KINDS[row["kind"]][1])
    assert {
        (case.bias, row["form"]) for row, case in CROSSED if not case.partition.divides
    } == set(product((False, True), FORMS))  # fmt: skip
    assert sum(case.size[0] != case.size[1] for _, case in CROSSED) > len(CROSSED) // 2
