"""The workbench on volumes: groups by their sides, the three-axis kernels, problems by the names that verify has."""

from __future__ import annotations

import argparse
import json
from typing import Any

import pytest

from bench.check import case_of
from bench.tiles import options, report
from bench.tiles.options import make_problem, read_tokens
from bench.tiles.report import Pass
from bench.tiles.roofline import MACHINES
from bench.tiles.verify import DEFAULT, SHAPES, VOLUMES
from isa_triton.partition import Partition
from tests.compiling import run_compiling


def test_verify_names_volumes_and_takes_maps_by_default() -> None:
    assert {SHAPES[shape].partition.tokens for shape in VOLUMES} == {144, 216, 343, 392}
    assert {*DEFAULT, *VOLUMES} == {*SHAPES}
    assert {len(SHAPES[shape].partition) for shape in DEFAULT} == {2}


def test_tokens_are_so_many_or_the_sides_of_a_group() -> None:
    assert [read_tokens(text) for text in ("49", "7x7", "2x6x12", "343x1")] == [49, (7, 7), (2, 6, 12), (343, 1)]


@pytest.mark.parametrize("text", ["", "0", "7x0x7", "-3", "7x7x7x7", "7x", "a", "7,7"])
def test_what_is_no_group_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be so many as 64, or one to three sides as 7x7x7, got"):
        read_tokens(text)


@pytest.mark.parametrize(
    ("partition", "wanted"),
    [
        ("local", Partition.local((28, 24, 48), (7, 6, 12))),
        ("interlaced", Partition.interlaced((28, 24, 48), stride=(4, 4, 4))),
        ("dense", Partition.dense((7, 6, 12))),
    ],
)
def test_sides_make_a_volume_of_such_groups(partition: str, wanted: Partition) -> None:
    problem = make_problem((7, 6, 12), 16, 24, partition, heads=3, bias=True)
    assert problem.partition == wanted
    assert (problem.partition.tokens, problem.partition.groups) == (504, 1 if partition == "dense" else 64)
    assert (problem.name, problem.heads, problem.bias) == (f"{partition} 7x6x12", 3, True)


def test_two_sides_and_one_make_maps_and_lines() -> None:
    assert make_problem((8, 8), 16, 16).partition == make_problem(64, 16, 16).partition
    assert make_problem((5,), 16, 16).partition == Partition.interlaced((320,), stride=(64,))


@pytest.mark.parametrize("shape", VOLUMES)
def test_a_volume_is_checked_as_it_is_compiled(shape: str) -> None:
    problem, case = SHAPES[shape], case_of(SHAPES[shape])
    assert case.partition == problem.partition
    assert (case.heads, case.bias, case.widths, case.maps) == (
        problem.heads, True, (problem.key_width, problem.value_width), problem.maps
    )  # fmt: skip


def test_the_bytes_and_flops_of_a_volume_are_counted_by_hand() -> None:
    problem = make_problem((2, 6, 12), 8, 24, "local", heads=5, bias=True, maps=3)
    pixels, pairs = 3 * 64 * 144, 3 * 64 * 144**2
    forward, backward = (Pass(problem, name, MACHINES["H100"], []) for name in ("forward", "backward"))
    assert forward.bytes == 2 * 5 * (pixels * (8 + 8 + 24 + 24) + 144**2)
    assert backward.bytes == 2 * 5 * (pixels * (8 + 8 + 24 + 24 + 8 + 8 + 24) + 2 * 144**2)
    assert (forward.flops, backward.flops) == (2 * 5 * pairs * 32, 2 * 5 * pairs * (3 * 8 + 2 * 24))


LAUNCHED = """
import json
from bench.tiles.compile import pass_launches
from bench.tiles.options import make_problem

rest = {"heads": 3, "bias": True}
problems = [make_problem(tokens, 16, 16, "local", **rest) for tokens in (343, (7, 7, 7), (7, 49), (343,))]
print(json.dumps([
    [[launch.name, launch.tile, len(launch.arguments["axes"]), launch.key] for pass_ in ("forward", "backward")
     for launch in pass_launches("sm_90", problem, pass_)]
    for problem in problems
]))
"""


def test_sides_choose_the_kernels_of_as_many_axes_and_the_same_tiles() -> None:
    done = run_compiling("-c", LAUNCHED)
    assert done.returncode == 0, done.stderr
    found: list[list[Any]] = json.loads(done.stdout)
    tiles, axes, keys = ([[launch[i] for launch in launches] for launches in found] for i in (1, 2, 3))
    assert tiles[0] == tiles[1] == tiles[2] == tiles[3]
    assert [set(of_one) for of_one in axes] == [{2}, {3}, {2}, {1}]
    assert keys[0] == keys[2]  # one binary for both sides of a map
    assert not {*keys[0]} & {*keys[1]}
    assert not {*keys[0], *keys[1]} & {*keys[3]}


def read(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return parser.parse_args(words)


def test_a_report_takes_a_problem_of_verify_by_name() -> None:
    problem = report._problem(read("--shape", "Video Swin 392", "--maps", "7", "--dtype", "fp16"))
    assert problem.partition == SHAPES["Video Swin 392"].partition
    assert (problem.maps, problem.dtype, problem.heads) == (7, "float16", 3)
    with pytest.raises(argparse.ArgumentError, match="--shape names a problem, and --tokens --bias describes another"):
        report._problem(read("--shape", "Swin 49", "--tokens", "7x7", "--bias"))
    assert options.given(read("--shape", "Swin 49")) == ""
