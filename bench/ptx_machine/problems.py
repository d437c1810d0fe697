"""What is checked on the machine; nothing here loads a kernel."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import product
from math import isqrt
from typing import Any

import torch

from bench.cases import Case
from isa_triton import tiles
from isa_triton.tiles import BackwardTiles, Tile

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")  # NVIDIA's of `tiles verify`
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
WIDEST = 520  # where an entry takes any width: more than any other has
LONGER = 16  # tokens more than the largest entry with a limit has, where one has none


@dataclass(frozen=True)
class Work:
    """One check: a case, how it is multiplied, and with which tiles.

    Attributes:
        in_turns: as `plan.IN_TURNS`: of fewer than there are groups and heads each program takes several.
        entries: the lines of the target's file that it runs, as (step, number).
    """

    target: str
    case: Case
    arithmetic: str
    forward: Tile
    backward: BackwardTiles
    dlse: bool = True
    in_turns: int = 1024
    entries: tuple[tuple[str, int], ...] = ()

    @property
    def tiles(self) -> str:
        """All tiles, in words."""
        chosen = {"forward": self.forward, **self.backward._asdict()}
        return " ".join(f"{step}={','.join(map(str, tile))}" for step, tile in chosen.items() if tile is not None)

    @property
    def name(self) -> str:
        """The case, and what is said of it here alone."""
        return f"{self.case}{', dlse' * self.dlse}"


def cases(target: str) -> list[Work]:
    """Every kernel in every dtype: groups of one block, of many, and whole ones; dividing, ragged and shifted.

    Scores of the first head may be large, which a wrong maximum makes infinite.
    """
    small, wide = Tile(16, 16, 16, 16, 4, 2), Tile(64, 64, 32, 32, 4, 3)
    across, down = Tile(32, 64, 16, 32, 4, 2), Tile(64, 32, 32, 16, 4, 2)
    longer = small._replace(num_stages=3)
    one = BackwardTiles(small, small, small, None, small)
    many = BackwardTiles(None, small, Tile(16, 16, 32, 64, 4, 3), None, small)
    whole = BackwardTiles(None, across, down, down, across)
    at_once = whole._replace(columns=Tile(64, 16, 32, 64, 4, 2))
    chosen = (
        (Case("interlaced", (7, 5), (3, 2), (24, 40), heads=2, bias=True, logits=60.0), small, one, True),
        (Case("local", (7, 6), (7, 4), (24, 40), heads=2, logits=60.0, shift=(1, 2)), longer, many, False),
        (Case("local", (14, 6), (7, 6), (24, 40), heads=2, bias=True), across, whole, True),
        (Case("grid", (16, 8), (8, 8), (64, 64), heads=2), wide, BackwardTiles(wide, wide, wide, None, wide), True),
        (Case("interlaced", (7, 12), (1, 2), (24, 40), heads=2, bias=True), across, at_once, True),
    )
    return [
        Work(target, replace(case, dtype=dtype), arithmetic, forward, backward, dlse, in_turns=4)
        for (arithmetic, dtype), (case, forward, backward, dlse) in product(DTYPES.items(), chosen)
    ]


def shipped(target: str) -> list[Work]:
    """Every tile that is shipped for a target and this Triton, each on one group of the size that it is made for."""
    works: dict[Any, Work] = {}
    entries = json.loads(tiles.file_for(target).read_text())
    for number, entry in enumerate(entries):
        if entry["tile"] is None:
            continue
        step, limits = entry["step"], (entry["key_width"], entry["value_width"], entry["tokens"])
        arithmetic = {"16-bit": "bfloat16", "ieee": "float32"}.get(entry["arithmetic"], entry["arithmetic"])
        key, value = (limit or WIDEST for limit in limits[:2])
        tokens = limits[2] or _longer(entries, entry)
        ways = (False,) if "bias" in entry else (tokens <= 256, True)  # without one, where it is large and may be
        biased = next((bias for bias in ways if _is_found(target, entry, key, value, arithmetic, tokens, bias)), None)
        if biased is None:
            continue  # an entry for another target or Triton, or one that another hides
        forward, backward = (
            tiles.lookup(target, "forward", key, value, arithmetic, tokens, biased),
            tiles.backward(target, key, value, arithmetic, tokens, biased),
        )
        at_once = step in ("forward", "group", "columns")
        group = backward.group if step in ("forward", "group") else None
        columns = backward.columns if at_once else None  # what would be launched in the step's place is left out
        skips = backward.group != group, backward.columns != columns
        backward = backward._replace(group=group, columns=columns)
        place = key, value, arithmetic, tokens, biased, skips
        work = works.get(place) or Work(
            target, _group(tokens, key, value, arithmetic, biased), arithmetic, forward, backward
        )
        works[place] = replace(work, entries=(*work.entries, (step, number)))
    return list(works.values())


def _is_found(
    target: str, entry: dict[str, Any], key: int, value: int, arithmetic: str, tokens: int, bias: bool
) -> bool:
    """Whether an entry is what serves a problem."""
    try:
        found = tiles.entry(target, entry["step"], key, value, arithmetic, tokens, bias)
    except LookupError:
        return False
    limits = entry["key_width"], entry["value_width"], entry["tokens"]
    return (found.key_width, found.value_width, found.tokens) == limits and list(found.tile) == entry["tile"]


def _longer(entries: list[dict[str, Any]], entry: dict[str, Any]) -> int:
    """More tokens than another entry of these widths serves, and no fewer than two blocks."""
    same = (e["tokens"] for e in entries if e["step"] == entry["step"] and e["tokens"] is not None)
    return max([max(entry["tile"][:2]) + LONGER, *(tokens + LONGER for tokens in same)])


def _group(tokens: int, key: int, value: int, arithmetic: str, bias: bool) -> Case:
    """One group of so many tokens, as square as they allow."""
    height = next(h for h in range(isqrt(tokens), 0, -1) if tokens % h == 0)
    size = height, tokens // height
    return Case("dense", size, size, (key, value), bias=bias, dtype=DTYPES[arithmetic], maps=1)
