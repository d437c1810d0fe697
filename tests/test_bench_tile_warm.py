"""What is compiled ahead: other maps of a problem, and how few binaries they need."""

from __future__ import annotations

import argparse
import csv

import pytest

from bench.tiles import warm
from bench.tiles.verify import SHAPES
from isa_triton.partition import Partition
from tests.compiling import run_compiling

WITHOUT_COMPILER = """
import sys
from bench.__main__ import main
from bench.tiles import warm
warm.compiled = lambda wanted, cache, pool: wanted
main(sys.argv[1:])
"""


def warmed(*words: str) -> tuple[list[dict[str, str]], str]:
    """The table, and what is said beside it."""
    done = run_compiling("-c", WITHOUT_COMPILER, "tiles", "warm", "--format", "csv", *words)
    assert done.returncode == 0, done.stderr
    return list(csv.DictReader(done.stdout.splitlines()[1:])), done.stderr


def test_windows_have_two_binaries_a_kernel_for_maps_that_they_divide_and_for_others() -> None:
    sizes = ["56", "64", "64x128", "97", "100x152", "128x256"]
    rows, said = warmed("--shapes", "ISA 64", "Swin 49", "MaxViT 49", "--sizes", *sizes, "--batches", "1", "2", "16")
    assert [(row["problem"], row["kernel"]) for row in rows] == [
        ("ISA 64", "forward_group"), ("ISA 64", "backward_group"),
        ("Swin 49", "forward_group"), ("Swin 49", "backward_group"),
        ("MaxViT 49", "forward_group"), ("MaxViT 49", "backward_group"),
    ]  # fmt: skip
    assert {row["maps"] for row in rows} == {"18"}
    assert {row["binaries"] for row in rows} == {"2"}
    assert all(int(row["by Triton's rule"]) >= 4 for row in rows)
    assert said.startswith("12 binaries for sm_90 are in Triton's cache.")


def test_without_sizes_a_problem_has_its_own_map() -> None:
    rows, _ = warmed("--shapes", "Swin 49", "--targets", "sm_80", "sm_90", "--dtypes", "bf16", "tf32")
    assert (
        {row["maps"] for row in rows} == {row["binaries"] for row in rows} == {row["by Triton's rule"] for row in rows}
    )
    assert [(row["target"], row["dtype"]) for row in rows] == [
        (target, dtype) for target in ("sm_80", "sm_90") for dtype in ("bfloat16", "tf32") for _ in range(2)
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_partition_on_its_own_map_is_itself(shape: str) -> None:
    assert warm.resized(SHAPES[shape], SHAPES[shape].partition.size) == SHAPES[shape].partition


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("ISA 64", Partition.local((40, 97), (8, 8))),
        ("ISA 256", Partition.interlaced((40, 97), stride=(8, 8))),
        ("MaxViT 144", Partition.interlaced((40, 97), grid=(12, 12))),
        ("HRFormer 49", Partition.local((40, 97), (7, 7))),
        ("dense 16384", Partition.dense((40, 97))),
    ],
)
def test_groups_stay_as_they_are_on_another_map(shape: str, wanted: Partition) -> None:
    assert warm.resized(SHAPES[shape], (40, 97)) == wanted


def test_volumes_stay_on_their_own_map() -> None:
    problems = [SHAPES["Pangu 144"], SHAPES["Swin 49"]]
    found = warm.on_maps(problems, argparse.Namespace(sizes=[(56, 56), (97, 64)], batches=[1, 4]))
    sizes = [problem.partition.size for problem in found]
    assert sizes == [(8, 91, 180)] * 2 + [(56, 56)] * 2 + [(97, 64)] * 2


def test_a_map_that_is_too_small_is_named() -> None:
    with pytest.raises(argparse.ArgumentError, match="--sizes: Swin 49: window"):
        warm.resized(SHAPES["Swin 49"], (6, 56))


RULE = """
from bench.tiles import warm
from bench.tiles.compile import Problem, pass_launches
from isa_triton.partition import Partition

def rule(size, maps=2):
    (launch,) = pass_launches("sm_90", Problem(Partition.local(size, (16, 8)), 64, 64, maps=maps), "forward")
    return warm.specialised_by_triton(launch)

assert rule((65, 41)) == rule((81, 57)) == rule((65, 41), maps=3)
assert len({rule(size) for size in ((65, 41), (65, 48), (128, 41), (65, 8))}) == 4
"""


def test_tritons_rule_tells_ones_and_multiples_of_16_apart() -> None:
    done = run_compiling("-c", RULE)
    assert done.returncode == 0, done.stderr
