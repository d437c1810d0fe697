"""Aurora's backbone, accelerated."""

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

ENTRIES = zoo("aurora")


@pytest.mark.parametrize(("entry", "size"), sizes(ENTRIES))
def test_is_the_same_function(entry: Entry, size: Size) -> None:
    check_same_function(entry, size)


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_is_a_module_like_others(entry: Entry) -> None:
    check_module_like_others(entry)


def test_a_layer_is_one_graph() -> None:
    check_one_graph(ENTRIES[1])


def test_a_layer_is_exported() -> None:
    check_exported(ENTRIES[1])
