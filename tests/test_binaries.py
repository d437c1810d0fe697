"""How many binaries a kernel has: at most so many for each tile, however many resolutions it meets."""

from __future__ import annotations

import json
from itertools import chain

import pytest

from tests.compiling import run_compiling

BOUND = 6
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
        yield f"{launch.name} {launch.tile}", launch.key

cases, sizes = json.loads(sys.argv[1])
print(json.dumps([[list(binaries(*case, size)) for size in sizes] for case in cases]))
"""
# Sides of 1 token, of a few and of 16; odd, and divided by 2, 4, 8 and 16: every pattern that Triton would tell apart.
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


def test_no_tile_has_more_binaries_than_the_bound(launched: list[Launched]) -> None:
    for case, launches in zip(CASES, launched, strict=True):
        found = binaries(launches)
        assert max(map(len, found.values())) <= BOUND, (case, {name: len(keys) for name, keys in found.items()})


def test_windows_have_one_binary_for_maps_that_they_divide_and_one_for_others(launched: list[Launched]) -> None:
    for case, launches in zip(CASES, launched, strict=True):
        if case[0] == "local":
            larger = [(size, found) for size, found in zip(OTHERS + PATTERNS, launches, strict=True) if size != (8, 8)]
            for divided in (True, False):
                same = [found for (height, width), found in larger if (height % 8 == width % 8 == 0) is divided]
                assert all(len(keys) == 1 for keys in binaries(same).values()), (case, divided)
            assert all(len(keys) == 2 for keys in binaries([found for _, found in larger]).values()), case
