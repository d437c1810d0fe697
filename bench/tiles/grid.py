"""The widths and windows that the field uses: cells of a grid, and the classes of them that have their tiles together.

A tile is not made for a cell. What a file holds for some widths serves groups of more tokens than the next smaller
entry has, up to its own (`isa_triton.tiles`): such cells are a class, with one tile a kernel.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, product
from typing import NamedTuple

from bench.tiles import options
from bench.tiles.compile import PASSES, Problem
from isa_triton.backend.kernels.plan import padded

WIDTHS = (*((width, width) for width in (16, 24, 30, 32, 48, 64, 80, 96, 128)), (256, 512))  # of keys, of values
TOKENS = 16, 36, 49, 64, 100, 144, 196, 256, 343, 392, 512, 576, 1024, 4096  # of a group
TARGETS = "sm_80", "sm_86", "sm_90", "sm_100", "gfx942"
PIXELS = 2**18  # of a batch, about: enough to fill a GPU, and the same for every group
HEADS = 4  # of what is narrower than the paper's 256 and 512
LONGEST = 1024  # tokens; the class beyond has no limit
FIRST = 32, 64, 30, 16, 80, 48, 128, 96, 256, 24  # widths of keys, as many people run them


class Class(NamedTuple):
    """Cells that have one tile for each kernel of a pass.

    What is found with a bias serves calls without one too, unless they have a tile of their own.
    """

    pass_: str
    tokens: int | None  # up to so many, None: any number
    problems: tuple[Problem, ...]


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
    """Up to how many tokens the class of such groups goes."""
    return padded(tokens) if tokens <= LONGEST else None


def classes(dtype: str, widths: Iterable[int] = FIRST, tokens: Iterable[int] = TOKENS) -> Iterator[Class]:
    """Those of some widths and groups, what most people run first.

    Args:
        widths: of keys.
        tokens: of a group, in any order.
    """
    chosen = [pair for width in FIRST if width in set(widths) for pair in WIDTHS if pair[0] == width]
    by_limit = [(key, list(group)) for key, group in groupby(sorted(tokens), limit)]
    for pair, (most, numbers), pass_, bias in product(chosen, by_limit, PASSES, (True, False)):
        yield Class(pass_, most, tuple(make_cell(n, pair, bias, dtype) for n in reversed(numbers)))
