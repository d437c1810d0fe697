"""The site is built without a warning and holds every public name; what contributors are told is true."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import pictures
from isa_triton import Partition
from tests.house import ROOT, mermaid

CONTRIBUTING = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
PACKAGES = ("isa_triton", "isa_triton.sharding")  # which list what is public
MODULES = (  # where it is what has an example
    "checkpoints",
    "inference",
    "models.block",
    "models.hrformer",
    "models.ianet",
    "models.resnet",
    "models.accelerated",
    "norm",
    "tiles",
    "backend",
    "backend.contract",
)


def public_names() -> set[str]:
    names = {f"{package}.{name}" for package in PACKAGES for name in importlib.import_module(package).__all__}
    for module in (importlib.import_module(f"isa_triton.{name}") for name in MODULES):
        for name, value in inspect.getmembers(
            module, lambda value: inspect.isclass(value) or inspect.isfunction(value)
        ):
            if value.__module__ == module.__name__ and ">>> " in (value.__doc__ or ""):
                names.add(f"{module.__name__}.{name}")
    return names


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_shows_every_public_name_with_an_example(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", ".docs/mkdocs.yml", "-d", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # the theme's own notice, of nothing that is wrong here
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr

    shown: dict[str, str] = {}  # every name, and what stands between its heading and the next
    for page in (tmp_path / "api").glob("*.html"):
        _, *parts = re.split(r'<h\d id="(isa_triton[^"]*)" class="doc', page.read_text())
        shown |= dict(zip(parts[::2], parts[1::2], strict=True))
    assert public_names() - shown.keys() == set()
    tops = {name for name in shown if not any(name.startswith(f"{other}.") for other in shown)}  # methods are inside
    assert {name for name in tops if "&gt;&gt;&gt; " not in shown[name]} == set()

    places = {entry["location"] for entry in json.loads((tmp_path / "search/search_index.json").read_text())["docs"]}
    assert {name for name in public_names() if not any(place.endswith(f"#{name}") for place in places)} == set()
    beside = [path for folder in ("isa_triton", "bench") for path in (ROOT / folder).rglob("README.md")]
    htmls = [tmp_path / path.relative_to(ROOT).with_name("index.html") for path in (ROOT / "README.md", *beside)]
    for html in (*htmls, tmp_path / "CONTRIBUTING.html", tmp_path / "CHANGELOG.html"):
        pictures_on_it = re.findall(r'<img [^>]*src="([^":]+)"', html.read_text())  # mkdocs checks Markdown's alone
        assert [source for source in pictures_on_it if not (html.parent / source).is_file()] == []


def test_the_picture_of_the_house_is_what_imports_are() -> None:
    (printed,) = re.findall(r"<!-- house -->\n```mermaid\n(.*?)\n```\n<!-- /house -->", CONTRIBUTING, re.DOTALL)
    assert printed == mermaid(), "print it anew: python -m tests.house"


def test_what_contributors_are_sent_to_exists() -> None:
    paths = set(re.findall(r"`([\w.]+/[\w./]*)`", CONTRIBUTING))
    assert len(paths) > 20
    assert {path for path in paths if not (ROOT / path).exists()} == set()


def test_a_constructor_is_drawn_as_its_title_says() -> None:
    figure = pictures.draw_constructors()
    titles = [axes.get_title() for axes in figure.axes]
    assert len({title.split("(")[0] for title in titles}) == 4
    for axes, title in zip(figure.axes, titles, strict=True):
        partition = eval(title, {"Partition": Partition})
        (image,) = axes.get_images()
        colours = image.get_array()  # [H, W, 4]; what is outlined is not faded
        groups = partition.seat(*np.indices(partition.size))[0]
        (outlined,) = set(groups[colours[..., 3] == 1])
        assert np.array_equal(groups == outlined, colours[..., 3] == 1)
    pictures.plt.close(figure)
    assert (ROOT / "bench" / "results" / "constructors.png").stat().st_size < 150_000
