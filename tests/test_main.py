"""What a user of the wheel has: its contents, and what ``python -m isa_triton`` says of a machine."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import torch

from isa_triton import __main__ as command
from isa_triton import __version__, _extras
from isa_triton.backend import triton as triton_backend
from tests.house import ROOT


def said() -> str:
    return "\n".join(command.report())


def test_it_tells_versions_and_why_a_cpu_takes_eager(compiling: None) -> None:
    assert f"isa_triton {__version__}" in said()
    assert f"torch      {torch.__version__}" in said()
    assert 'device cpu: cpu\n  backend="auto" takes eager: the kernels run on cuda and xpu devices' in said()
    assert "tiles:" not in said()


@pytest.mark.usefixtures("interpreter")
def test_it_tells_when_kernels_are_interpreted() -> None:
    assert '"triton" interprets the kernels, with the tiles of sm_80' in said()
    assert "sm_80.json (made for it)" in said()


def test_it_tells_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_version_of", lambda package: None)
    monkeypatch.setattr(triton_backend, "INSTALLED", False)
    assert "triton     not installed" in said()
    assert "takes eager: triton is not installed" in said()


@pytest.mark.parametrize(
    ("capability", "tiles"),
    [
        ((9, 0), "sm_90.json (made for it)"),
        ((8, 9), "sm_86.json (sm_86's serve sm_89)"),
        ((7, 5), "(sm_86's serve sm_75)"),
    ],
)
def test_it_tells_whose_tiles_a_gpu_runs_with(
    capability: tuple[int, int], tiles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    monkeypatch.setattr(command, "_devices", lambda: [torch.device("cuda", 1)])
    empty = SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: empty)
    assert f"device cuda:1: A card, sm_{capability[0]}{capability[1]}\n" in said()
    assert 'backend="auto" takes triton for float16, bfloat16, float32' in said()
    assert tiles in said()


@pytest.mark.parametrize(
    ("word", "answer"),
    [("bench", f"not in the wheel: in {ROOT}, pip install -e"), ("help", "usage: python -m isa_triton")],
)
def test_other_words_are_answered_in_one_line(word: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main([word])
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert answer in line


def test_the_wheel_has_the_library_its_tiles_and_types_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(ZipFile(wheel).namelist())
    library = {
        str(path.relative_to(ROOT)) for end in ("py", "json") for path in (ROOT / "isa_triton").rglob(f"*.{end}")
    }
    assert library | {"isa_triton/py.typed"} <= names
    assert f"isa_triton-{__version__}" in wheel.name
    others = {name.split("/")[0] for name in names}
    assert others == {"isa_triton", f"isa_triton-{__version__}.dist-info"}


def test_an_editable_install_shows_the_library_alone(tmp_path: Path) -> None:
    """Names as common as bench and tests are nobody's but the checkout's."""
    build = f"from hatchling.build import build_editable; build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    ZipFile(wheel).extractall(tmp_path)
    shown = (
        f"import site; from importlib.util import find_spec; site.addsitedir({str(tmp_path)!r});"
        "print(*(find_spec(name) is not None for name in ('isa_triton', 'bench', 'reference', 'tests')))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", shown], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False", "False"]


def test_hints_name_the_checkout_where_there_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    assert _extras.install("vision") == "pip install -e '.[vision]'"
    monkeypatch.chdir(tmp_path)
    assert _extras.install("vision") == f"pip install -e '{ROOT}[vision]'"
    monkeypatch.setattr(_extras, "CHECKOUT", None)
    assert _extras.install("vision") == "pip install 'isa-triton[vision]'"


def test_hints_name_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    sources = [path.read_text() for folder in ("isa_triton", "bench") for path in (ROOT / folder).rglob("*.py")]
    named = {name for source in sources for name in re.findall(r"\binstall\(['\"](\w+)['\"]\)", source)}
    assert set() < named < extras.keys()
