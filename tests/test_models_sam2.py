"""SAM 2's Hiera of Meta's package, accelerated."""

from __future__ import annotations

import pytest

from bench.models.zoo import Entry, Size
from tests.accelerated_models import (
    check_exported,
    check_module_like_others,
    check_one_graph,
    check_same_function,
    sizes,
    zoo,
)

ENTRIES = zoo("sam2")


@pytest.mark.parametrize(("entry", "size"), sizes(ENTRIES))
def test_is_the_same_function(entry: Entry, size: Size) -> None:
    check_same_function(entry, size)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_is_a_module_like_others(entry: Entry) -> None:
    check_module_like_others(entry)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_is_one_graph(entry: Entry) -> None:
    check_one_graph(entry)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_is_exported(entry: Entry) -> None:
    check_exported(entry)
