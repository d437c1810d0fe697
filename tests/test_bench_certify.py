"""The certificate: whatever happens to an item is a row, a run that is killed goes on, the page says what came out."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.certify import conduct, page, peers, rows, speed
from bench.certify.parts import PARTS, Part
from bench.certify.rows import Certificate, Found, Item, Setting
from bench.certify.speed import beside_peers
from tests import certified
from tests.compiling import ROOT

HERE = Setting("cpu", ("Swin 49",), 1, "nowhere")
COMMAND = ["certify", "--device", "cpu", "--shapes", "ISA 256", "Swin 49", "HRFormer 49", "dense 16384"]
PLANTED = Part("z", "Planted", "planted.csv", ("what",), "tests.certified", limit=4.0)


class Bar:
    """Of a progress that nobody sees."""

    def now(self, what: str) -> None: ...

    def advance(self) -> None: ...


# -- a run without a GPU -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one, made on the CPU, every part."""
    folder = tmp_path_factory.mktemp("certificate")
    words = [sys.executable, "-m", "bench", *COMMAND, "--jobs", "1", "--cache", str(folder / "cache"), "--out",
             str(folder / "out")]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2] == SENTENCE
    return folder / "out"


SENTENCE = "48 items: 22 passed, 3 measured, 23 could not run, 0 failed."


def found(folder: Path) -> dict[str, dict[str, str]]:
    """What became of every item, by part and name."""
    kept = json.loads((folder / "certificate.json").read_text())["rows"]
    made: dict[str, dict[str, str]] = {}
    for row in kept:
        made.setdefault(row["part"], {})[", ".join(row["name"])] = row["outcome"]
    return made


@pytest.mark.slow
def test_every_part_runs_without_a_gpu(certificate: Path) -> None:
    outcomes = found(certificate)
    assert list(outcomes) == list(PARTS)
    assert outcomes["a"]["binaries"] == "passed"
    shapes = {"ISA 256": "float16", "Swin 49": "float16", "HRFormer 49": "float32", "dense 16384": "float32"}
    assert outcomes["b"] == {f"{shape}, {dtype}": "passed" for shape, dtype in shapes.items()}
    assert {name for name, outcome in outcomes["c"].items() if outcome == "passed"} == {
        "compile", "autocast", "far rows",
    }  # fmt: skip
    assert set(outcomes["d"].values()) == set(outcomes["f"].values()) == {"not run"}
    for shape in ("Swin 49", "HRFormer 49"):
        for who in ("isa_triton", "sdpa", "authors"):
            assert {outcomes["e"][f"{shape}, {pass_}, {who}"] for pass_ in speed.PASSES} == {"passed"}
        assert outcomes["e"][f"{shape}, forward, flex"] == "passed"
    assert set(outcomes["g"].values()) == {"measured"}


@pytest.mark.slow
def test_the_page_says_that_it_was_interpreted_and_the_tables_hold_the_rows(certificate: Path) -> None:
    text = (certificate / "certificate.md").read_text()
    assert text.startswith("# Certificate of isa_triton: interpreted on ")
    assert SENTENCE in text
    assert "**interpreted**" in text
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "What failed", "Where it is slower than a peer", "What could not run",
        *(f"{letter}. {part.title}" for letter, part in PARTS.items()),
    ]  # fmt: skip
    assert "## What failed\n\nNothing.\n" in text
    assert "Nothing was timed." in text
    assert not list(certificate.glob("*.png"))
    for letter, part in PARTS.items():
        lines = list(csv.DictReader((certificate / part.file).read_text().splitlines()))
        assert {", ".join(line[name] for name in part.columns): line["outcome"] for line in lines} == found(
            certificate
        )[letter]
    errors = list(csv.DictReader((certificate / "correctness.csv").read_text().splitlines()))
    assert all(0 < float(line[name]) <= 1 for line in errors for name in ("out", "dq", "dk", "dv"))
    assert [bool(line["lse"]) for line in errors] == [True, True, False, False]
    assert [bool(line["dbias"]) for line in errors] == [False, True, True, False]
    predicted = list(csv.DictReader((certificate / "predictions.csv").read_text().splitlines()))
    assert [line["rates of"] for line in predicted] == ["H100", "H100"]
    assert 0 < float(predicted[0]["predicted us"]) < float(predicted[1]["predicted us"])


@pytest.mark.slow
def test_a_certificate_that_is_whole_is_not_made_again(certificate: Path) -> None:
    before = (certificate / "certificate.json").read_text()
    main([*COMMAND, "--out", str(certificate)])
    assert (certificate / "certificate.json").read_text() == before


# -- whatever happens --------------------------------------------------------------------------------------------------


def looked_at(part: Part, setting: Setting, folder: Path, seconds: float = 600.0) -> tuple[Certificate, list[Item]]:
    """The rows of a planted part, and the items without time."""
    kept = Certificate(folder / "certificate.json", {})
    assert kept.read()
    todo = rows.left(part.all(setting), kept)
    return kept, conduct.conduct(todo, setting, kept, folder / "log.txt", seconds, Bar())


@pytest.mark.slow
def test_what_fails_hangs_or_crashes_is_a_row_and_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "z", PLANTED)
    kept, without_time = looked_at(PLANTED, HERE, tmp_path)
    made = {name: (row.outcome, row.why) for (name,), row in kept.of("z").items()}
    assert without_time == []
    assert made == {
        "right": ("passed", ""),
        "wrong": ("failed", "is wrong"),
        "raises": ("failed", "IndexError: out of bounds"),
        "crashes": ("failed", f"its process ended with SIGSEGV: {certified.SAID}"),
        "hangs": ("failed", f"was ended after 4 seconds: {certified.SAID}"),
        "cannot": ("not run", "there is no such thing here"),
        "takes the device": ("passed", ""),
        "right again": ("passed", ""),
    }
    processes = {name: row.figures.get("process") for (name,), row in kept.of("z").items()}
    assert processes["right"] == processes["wrong"] != processes["takes the device"] != processes["right again"]
    again = Certificate(tmp_path / "certificate.json", {})
    assert again.read()
    assert again.rows == kept.rows


@pytest.mark.slow
def test_a_part_that_does_not_start_is_failed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "z", Part("z", "Planted", "z.csv", ("what",), "tests.certified_elsewhere"))
    kept = Certificate(tmp_path / "certificate.json", {})
    conduct.conduct([Item("z", ("one",))], HERE, kept, tmp_path / "log.txt", 60.0, Bar())
    assert kept.rows[Item("z", ("one",))].outcome == "failed"
    assert "No module named 'tests.certified_elsewhere'" in kept.rows[Item("z", ("one",))].why


@pytest.mark.slow
def test_a_killed_run_goes_on_and_leaves_nobody_behind(tmp_path: Path) -> None:
    part = "Part('z', 'Planted', 'z.csv', ('what',), 'tests.certified', items='slow', run='sleep')"
    code = f"""
from tests.test_bench_certify import Bar, Part, PARTS, Path, Setting, looked_at
PARTS["z"] = {part}
looked_at(PARTS["z"], Setting("cpu", (), 1, {str(tmp_path / "cache")!r}), Path({str(tmp_path)!r}))
"""
    run = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(run, env=environment, cwd=ROOT)
    pid = tmp_path / "cache.pid"
    wait_for(lambda: pid.exists() and pid.read_text())
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = json.loads((tmp_path / "certificate.json").read_text())["rows"]
    assert [row["name"] for row in before] == [["0"], ["1"]]
    wait_for(lambda: not Path(f"/proc/{pid.read_text()}/exe").exists())  # a zombie that nobody reaps has none
    (tmp_path / "cache").mkdir()
    assert subprocess.run(run, env=environment, cwd=ROOT, check=False).returncode == 0
    after = json.loads((tmp_path / "certificate.json").read_text())["rows"]
    assert after[:2] == before
    assert [row["name"] for row in after] == [["0"], ["1"], ["2"], ["3"]]


def wait_for(holds: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_without_time_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "z", PLANTED)
    kept, without_time = looked_at(PLANTED, HERE, tmp_path, seconds=0.0)
    assert kept.rows == {}
    assert without_time == PLANTED.all(HERE)
    judged = page.Judged(kept_of({}), without_time)
    assert judged.sentence == "8 items: 0 failed, 8 without time."


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"conditions": {"host": "another"}, "rows": []}'])
def test_a_certificate_of_other_conditions_is_forgotten(text: str, tmp_path: Path) -> None:
    (tmp_path / "certificate.json").write_text(text)
    kept = Certificate(tmp_path / "certificate.json", {"host": "this"})
    assert not kept.read()
    assert kept.rows == {}


# -- the page ----------------------------------------------------------------------------------------------------------


def measured(us: float) -> Found:
    return Found("measured", "", {"us": us})


def kept_of(found: dict[Item, Found]) -> Certificate:
    kept = Certificate(Path("nowhere"), {"host": "NVIDIA H100", "versions": "torch 2.11.0", "sources": ""})
    kept.rows = found
    return kept


TIMES = {
    ("Swin 49", "forward", "isa_triton"): measured(30.0),
    ("Swin 49", "forward", "sdpa"): measured(20.0),
    ("Swin 49", "forward", "flex"): measured(24.0),
    ("ISA 64", "forward", "isa_triton"): measured(10.0),
    ("ISA 64", "forward", "sdpa"): measured(40.0),
    ("ISA 64", "forward", "flex"): Found("not run", "OutOfResources: shared memory"),
    ("ISA 64", "training", "isa_triton"): measured(10.4),
    ("ISA 64", "training", "authors"): measured(10.0),
}


def test_slower_is_said_beside_the_fastest_peer() -> None:
    judged = {name: (row.outcome, row.why) for name, row in beside_peers(TIMES).items() if name[2] == "isa_triton"}
    assert judged == {
        ("Swin 49", "forward", "isa_triton"): ("slower", f"1.50 times the time of sdpa, {peers.PEERS['sdpa'].title}"),
        ("ISA 64", "forward", "isa_triton"): ("measured", f"0.25 times the time of sdpa, {peers.PEERS['sdpa'].title}"),
        ("ISA 64", "training", "isa_triton"): (
            "measured", f"1.04 times the time of authors, {peers.PEERS['authors'].title}",
        ),
    }  # fmt: skip


def test_the_page_says_what_failed_was_slower_and_could_not_run(tmp_path: Path) -> None:
    planted = {Item("e", name): row for name, row in TIMES.items()}
    planted |= {
        Item("a", ("device",)): Found("measured", "", {"name": "NVIDIA H100", "SMs": 132}),
        Item("b", ("ISA 64", "tf32")): Found("failed", "dq has 3 NaN of 64, as memory that was not written has"),
        Item("d", ("memcheck", "Swin 49")): Found("not run", "compute-sanitizer is not installed"),
        Item("d", ("racecheck", "Swin 49")): Found("not run", "compute-sanitizer is not installed"),
        Item("g", ("ISA 64", "forward")): Found("measured", "", {"predicted us": 8.0, "kernels": "forward 8.0"}),
    }
    judged = page.Judged(kept_of(planted), [Item("f", ("ISA 64", "forward"))])
    written = page.write(tmp_path, Setting("cuda", (), 1, ""), judged, "python -m bench certify --device cuda")
    text = (tmp_path / "certificate.md").read_text()
    assert text.startswith("# Certificate of isa_triton: compiled and run on NVIDIA H100\n\n14 items: 8 measured, ")
    assert judged.sentence == ("14 items: 8 measured, 1 slower than a peer, 3 could not run, 1 failed, 1 without time.")
    for line in (
        "## What failed\n\n- (b) ISA 64, tf32: dq has 3 NaN of 64, as memory that was not written has\n",
        f"## Where it is slower than a peer\n\n- (e) Swin 49, forward, isa_triton: 1.50 times the time of sdpa, "
        f"{peers.PEERS['sdpa'].title}\n",
        "- (d) memcheck, Swin 49; racecheck, Swin 49: compute-sanitizer is not installed\n",
        "There was no time for 1 items; the same command goes on with them:\n\n- f: ISA 64, forward\n",
        "![times.png](times.png)\n",
        "![predictions.png](predictions.png)\n",
    ):
        assert line in text
    assert "interpreted" not in text
    assert re.search(r"\| ISA 64 +\| forward +\| +10.0 \| +40.0 \|", text)
    (prediction,) = csv.DictReader((tmp_path / "predictions.csv").read_text().splitlines())
    assert (prediction["measured us"], prediction["measured / predicted"]) == ("10.0", "1.25")
    assert all(path.stat().st_size for path in written)
    assert {path.name for path in written if path.suffix == ".png"} == {"times.png", "predictions.png"}
