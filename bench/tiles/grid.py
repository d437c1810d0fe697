"""The widths and windows that the field uses: cells of a grid, and in which order tiles are searched for them.

A tile is not made for a cell. What a file holds for some widths serves smaller ones and shorter groups too, down to the
next entry (`isa_triton.tiles`); so a sweep begins with the longest, and adds an entry only where it is worth it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

from bench.tiles import options
from bench.tiles.compile import PASSES, Problem

WIDTHS = (*((width, width) for width in (16, 24, 30, 32, 48, 64, 80, 96, 128)), (256, 512))  # of keys, of values
TOKENS = 16, 36, 49, 64, 100, 144, 196, 256, 343, 392, 512, 576, 1024, 4096  # of a group
TARGETS = "sm_80", "sm_86", "sm_90", "sm_100", "gfx942"
PIXELS = 2**18  # of a batch, about: enough to fill a GPU, and the same for every group
HEADS = 4  # of what is narrower than the paper's 256 and 512
LONGEST = 1024  # tokens that an entry is limited to; longer groups are all alike
FIRST = 32, 64, 30, 16, 80, 48, 128, 96, 256, 24  # widths of keys, as many people run them


def make_cell(tokens: int, widths: tuple[int, int], bias: bool, dtype: str) -> Problem:
    """Windows of so many tokens on a batch of about `PIXELS` pixels."""
    groups, heads = options.GROUPS[0] * options.GROUPS[1], HEADS if widths[0] < 256 else 1
    maps = max(1, round(PIXELS / (groups * tokens)))
    return options.make_problem(tokens, *widths, "local", maps, dtype, heads=heads, bias=bias)


def cells(dtype: str) -> Iterator[tuple[Problem, str]]:
    """Every problem with every pass."""
    for pass_, widths, tokens, bias in product(PASSES, WIDTHS, TOKENS, (False, True)):
        yield make_cell(tokens, widths, bias, dtype), pass_


def limit(tokens: int) -> int | None:
    """Up to how many tokens an entry goes that was made for a group."""
    return max(16, tokens) if tokens <= LONGEST else None


def in_turn(
    dtype: str, widths: Iterable[int], tokens: Iterable[int], passes: Iterable[str] = PASSES
) -> Iterator[tuple[Problem, str]]:
    """Cells with some widths of keys and groups, as a sweep takes them: what most people run first, and of a width the
    longest groups, whose tiles serve shorter ones too; and calls with a bias before those without.
    """
    chosen = [pair for width in FIRST if width in set(widths) for pair in WIDTHS if pair[0] == width]
    for pair, n, pass_, bias in product(chosen, sorted(tokens, reverse=True), passes, (True, False)):
        yield make_cell(n, pair, bias, dtype), pass_
