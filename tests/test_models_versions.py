"""Versions of packages: what a page says, and what a user is told whose package has other classes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from bench.models.zoo import entries
from isa_triton.models import accelerate, accelerated
from isa_triton.models.accelerated.families import FAMILIES, VERSIONS
from tests.house import ROOT


def test_the_page_names_the_versions_that_were_tried() -> None:
    page = (ROOT / "isa_triton/models/README.md").read_text()
    rows = re.findall(r"^\| (\w+) \| ([\d.]+)(?: to ([\d.]+))? \|", page, re.MULTILINE)
    assert {name: (oldest, newest or oldest) for name, oldest, newest in rows} == VERSIONS
    assert {ours.split("_")[0] for ours in FAMILIES.values()} == VERSIONS.keys()


@pytest.mark.parametrize("change", ["gone", "parameters"])
def test_a_package_with_other_classes_is_met_by_both_versions(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that ours takes the place of is gone, or takes something else."""
    network = entries("timm")[1].make()
    block: Any = next(module for module in network.modules() if type(module).__name__ == "SwinTransformerBlock")
    if change == "gone":
        monkeypatch.delattr(type(block), "_attn")
    else:
        monkeypatch.setattr(type(block), "_attn", lambda self, x, mask: x)
    with pytest.raises(
        ImportError, match=r"knows timm from 1\.0\.3 to [\d.]+, and other classes .* installed [\d.]+ \(.*_attn"
    ):
        accelerate(network)


def test_every_network_of_none_of_them_is_refused_with_their_names() -> None:
    with pytest.raises(ValueError, match=f"window attention of {', '.join(VERSIONS)}, got Linear without any"):
        accelerate(nn.Linear(2, 2))
    assert accelerated.report(nn.Linear(2, 2)) == []
