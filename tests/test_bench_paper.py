"""`python -m bench paper`: the authors' figures come out of our modules, and every difference has its name."""

from __future__ import annotations

import csv
from functools import partial

import pytest
import torch
from torch import nn

import reference
from bench import measure
from bench.__main__ import main
from bench.compared import PROVIDERS
from bench.paper import (
    AUTHORS,
    CHANNELS,
    HEADS,
    MAPS,
    count,
    parameters,
)
from bench.workload import Workload
from tests.cases import relative_error

# Who is timed as a whole head, and what it is in the paper's table
PROVIDED = {"isa": "ISA", "unfused": "ISA", "dense": "SA", "dense-sdpa": "SA", "rcca": "RCCA", "ppm": "PPM"}
# GFLOPs that the script leaves for the modules without the 3x3 convolution before them
ALONE = {"SA": (85.9, 110.4, 309.3, 1168.3, 4535.6), "ISA": (36.8, 43.4, 76.8, 166.5, 384.6)}


pytestmark = pytest.mark.slow  # every head of the paper is built and counted


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], dict[str, str]]:
    """The rows of one run's paper.csv."""
    out = tmp_path_factory.mktemp("results")
    main(["paper", "--out", str(out)])
    with (out / "paper.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["module"], int(row["height"]), int(row["width"])): row for row in rows}


def test_the_columns_and_rows_of_the_csv(written: dict[tuple[str, int, int], dict[str, str]]) -> None:
    columns = ["module", "height", "width", "authors_gflops", "script_gflops", "exact_gflops", "parameters"]
    assert {tuple(row) for row in written.values()} == {tuple(columns)}
    assert set(written) == {(name, *map_) for name in HEADS for map_ in MAPS}
    assert list(HEADS) == ["ISA", "SA", "RCCA", "PPM", "ASPP"]


def test_every_figure_of_the_authors_is_met(written: dict[tuple[str, int, int], dict[str, str]]) -> None:
    for (name, *map_), row in written.items():
        authors = AUTHORS[name][MAPS.index(tuple(map_))]
        assert float(row["authors_gflops"]) == authors
        assert float(row["script_gflops"]) == pytest.approx(authors, rel=5e-3), (name, map_)


def test_the_modules_alone_are_the_authors_too(written: dict[tuple[str, int, int], dict[str, str]]) -> None:
    for name, figures in ALONE.items():
        for map_, authors in zip(MAPS, figures, strict=True):
            convolution = (2 * 9 * CHANNELS + 1) * 512 * map_[0] * map_[1] / 1e9
            assert float(written[(name, *map_)]["script_gflops"]) - convolution == pytest.approx(authors, abs=0.1)


def test_parameters_of_the_published_sizes(written: dict[tuple[str, int, int], dict[str, str]]) -> None:
    assert written["ISA", 128, 128]["parameters"] == "11804672"
    assert parameters(list(HEADS["ISA"]().children())[1]) == 2_366_464


def test_differences_are_what_they_are_called() -> None:
    pixels, padded = 97 * 97, 104 * 104
    isa = count(HEADS["ISA"], 97, 97)
    assert isa.beyond["second"] == 2 * 2 * 2 * 256 * 256 * padded
    assert isa.beyond["padding"] == 2 * 2 * 512 * (256 + 256 + 512 + 512) * (padded - pixels)
    assert isa.beyond["biases"] == -(512 + 2 * (256 + 256 + 512 + 512) + 512) * pixels
    attention = 2 * 768 * padded * (padded // 64 + 64)
    convolutions = 2 * 512 * pixels * (9 * CHANNELS + 1024) + 2 * padded * (2 * 512 * 1536 + 4 * 256 * 256)
    assert isa.exact == attention + convolutions
    sa = count(HEADS["SA"], 64, 128)
    assert sa.beyond["padding"] == 0
    assert sa.exact == 2 * 64 * 128 * (9 * CHANNELS * 512 + 512 * (4 * 256 + 1024) + 2 * 256 * 256 + 64 * 128 * 512)


def test_heads_compute_a_map() -> None:
    """The counted heads are real modules: on a small map of few channels they run."""
    x = torch.randn(2, 32, 9, 11)
    heads: list[nn.Module] = [reference.RCCAHead(32, 16), reference.PPM(32, 16), reference.ASPP(32, 16)]
    for head in heads:
        assert head(x).shape == (2, 16, 9, 11)
        single = torch.cat([head.eval()(x[i : i + 1]) for i in range(2)])
        assert relative_error(single, head(x)) < 1e-5


@pytest.mark.parametrize(("provider", "module"), PROVIDED.items())
def test_the_heads_that_are_timed_are_those_of_the_paper(provider: str, module: str) -> None:
    workload = Workload("head", "forward", 24, 40)
    flops, _ = measure.count(partial(measure.step, PROVIDERS[provider], workload))
    # on a CPU our stages have one product for values and output, and one of their weights
    less = 2 * 2 * (24 * 40 * 512 * 512 - 512**3) if provider == "isa" else 0
    assert flops == pytest.approx(count(HEADS[module], 24, 40).exact - less, rel=2e-3)
    with torch.device("meta"):
        assert parameters(PROVIDERS[provider].build(workload, "meta")) == parameters(HEADS[module]())
