"""How many binaries a kernel has: at most so many for each tile, however many resolutions it meets.

Triton makes a binary for every pattern of its integers that are 1 or that 16 divides; without what it knows from that,
kernels spill. Sizes, tokens and strides of all maps have 33 patterns for P = 8 and one head, 39 for four heads.
"""

from __future__ import annotations

import json
from itertools import chain

import pytest

from tests.compiling import run_compiling

BOUND = 40
COUNT = """
import json, sys
from bench.tiles.compile import Problem, backward_launches, forward_launches
from isa_triton import tiles
from isa_triton.partition import Partition

TARGET, PARTITIONS = "sm_90", {
    "local": lambda size: Partition.local(size, window=(8, 8)),
    "interlaced": lambda size: Partition.interlaced(size, stride=(8, 8)),
}

def binaries(kind, key_width, value_width, heads, size):
    problem = Problem(PARTITIONS[kind](tuple(size)), key_width, value_width, heads)
    launches = forward_launches(TARGET, problem, tiles.lookup(TARGET, "forward", *problem.sizes), with_lse=True)
    for launch in launches + backward_launches(TARGET, problem, tiles.backward(TARGET, *problem.sizes)):
        constants = {path: value for path, value in launch.constants.items() if len(path) == 1}  # the tile and widths
        yield f"{launch.name} {constants} {launch.options}", launch.key

cases, sizes = json.loads(sys.argv[1])
print(json.dumps([[list(binaries(*case, size)) for size in sizes] for case in cases]))
"""
# Sides of 1 token, of a few and of 16; odd, and divided by 2, 4, 8 and 16: every pattern.
SIDES = (8, 17, 18, 20, 24, 32, 121, 122, 124, 128)
PATTERNS = [(height, width) for height in SIDES for width in SIDES]
OTHERS = [(97, 97), (64, 128), (128, 256), (33, 65), (56, 56), (100, 152), (75, 100), (512, 512), (9, 300), (160, 48),
          *((60 + 7 * i, 61 + 11 * i) for i in range(30))]  # fmt: skip
CASES = [("local", 256, 512, 1), ("local", 64, 64, 4), ("local", 39, 39, 1), ("interlaced", 256, 512, 1)]
Launched = list[list[tuple[str, str]]]  # for every resolution: kernel and tile, and the binary


@pytest.fixture(scope="module")
def launched() -> list[Launched]:
    """What each case launches, at every one of the others and then of the patterns."""
    done = run_compiling("-c", COUNT, json.dumps((CASES, OTHERS + PATTERNS)))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def binaries(launched: Launched) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, binary in chain.from_iterable(launched):
        found.setdefault(name, set()).add(binary)
    return found


@pytest.mark.slow
def test_no_tile_has_more_binaries_than_the_bound(launched: list[Launched]) -> None:
    for case, launches in zip(CASES, launched, strict=True):
        assert max(map(len, binaries(launches).values())) <= BOUND, case


def test_other_resolutions_need_no_other_binaries(launched: list[Launched]) -> None:
    for case, launches in zip(CASES, launched, strict=True):
        if case[0] == "interlaced":
            continue  # the tile depends on the tokens, and so on the map
        ten, forty, every = binaries(launches[:10]), binaries(launches[:40]), binaries(launches[40:])
        assert len(every) == 2  # windows of 64 tokens have one tile forward and one backward
        for name in every:
            assert ten[name] < forty[name] < every[name]
