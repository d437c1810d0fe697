"""Parts d and f: NVIDIA's tools around one call of the kernels, where they are installed.

compute-sanitizer watches every access to memory (memcheck) and to shared memory (racecheck); ncu reads the counters of
the GPU, which stand beside what was counted in the kernels' code.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from bench.certify import speed
from bench.certify.problems import TIMED
from bench.certify.rows import Found, Name, NotRun, Setting
from bench.tiles.compile import pass_launches
from bench.tiles.program import work

CHECKS = ("memcheck", "racecheck")
CHECKED = ("heads 256", "HRFormer 49")  # passes of long groups; a bias on chip, and a ragged map
COUNTED = ("ISA 64", "ISA 256", "heads 256", "Swin 49")
DRAM, L2 = ("dram__bytes_read.sum", "dram__bytes_write.sum"), "lts__t_bytes.sum"
MATRIX = "sm__inst_executed_pipe_tensor.sum"
BUSY = "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active"
CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu.sum"
METRICS = (*DRAM, L2, MATRIX, BUSY, CONFLICTS, "gpu__time_duration.sum")
LONGEST = 100.0  # seconds of a tool


# -- d -----------------------------------------------------------------------------------------------------------------


def items(setting: Setting) -> list[Name]:
    return [(check, shape) for check in CHECKS for shape in CHECKED if shape in setting.shapes]


def run(setting: Setting, check: str, shape: str) -> Found:
    tool = _installed("compute-sanitizer", setting)
    said = _around([tool, "--tool", check, "--kernel-regex", "kns=ward_"], setting, shape, "training", "1")
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", said)
    if summary is None:
        raise NotRun(f"{check} said nothing: {_last_line(said)}")
    errors = int(summary[1])
    return Found.judged(f"{check} found {errors}: {_first_error(said)}" if errors else "", errors=errors)


def _first_error(said: str) -> str:
    found = re.search(r"^=+ ((?:Invalid|Error|Warning|Potential|Race|Illegal|Misaligned).*)$", said, re.MULTILINE)
    return found[1] if found else _last_line(said)


# -- f -----------------------------------------------------------------------------------------------------------------


def counters(setting: Setting) -> list[Name]:
    return [(shape, pass_) for shape in COUNTED if shape in setting.shapes for pass_ in ("forward", "backward")]


def count(setting: Setting, shape: str, pass_: str) -> Found:
    tool = _installed("ncu", setting)
    around = [tool, "--csv", "--print-units", "base", "--clock-control", "none", "--profile-from-start", "off",
              "--kernel-name", "regex:^(forward|backward)_", "--metrics", ",".join(METRICS)]  # fmt: skip
    maps = str(speed.maps_of(shape))
    said = _around(around, setting, shape, "forward" if pass_ == "forward" else "training", maps)
    totals = _totals(said, pass_)
    if not totals:
        raise NotRun(f"ncu counted nothing: {_last_line(said)}")
    problem = replace(speed.timed(setting, shape), dtype=TIMED)
    launches = pass_launches(speed.target(setting), problem, pass_)
    verdicts = speed.binaries(setting).verdicts(launches)
    works = [work(v.binary.loops, v.binary.ops, v.launch) for v in verdicts if v.binary is not None]
    moved, asked = sum(each.distinct for each in works), sum(each.bytes for each in works)
    dram = sum(totals[name] for name in DRAM)
    figures = {
        "DRAM MB": _mega(dram), "counted DRAM MB": _mega(moved), "DRAM / counted": f"{dram / moved:.2f}",
        "L2 MB": _mega(totals[L2]), "counted L2 MB": _mega(asked), "L2 / counted": f"{totals[L2] / asked:.2f}",
        "matrix instructions": int(totals[MATRIX]), "matrix units busy, %": f"{totals[BUSY]:.0f}",
        "bank conflicts": int(totals[CONFLICTS]), "us": f"{totals['gpu__time_duration.sum'] / 1e3:.1f}",
    }  # fmt: skip
    return Found("measured", "", figures)


def _mega(number: float) -> str:
    return f"{number / 1e6:.1f}"


def _totals(said: str, pass_: str) -> dict[str, float]:
    """Every metric, added over the kernels of a pass (the busy part: of the busiest), from ncu's CSV."""
    lines = [line for line in said.splitlines() if line.startswith('"')]
    found: dict[str, float] = defaultdict(float)
    for row in csv.DictReader(lines):
        name, value = row["Metric Name"], row["Metric Value"].replace(",", "")
        if row["Kernel Name"].startswith(pass_) and re.fullmatch(r"[\d.]+", value):
            found[name] = max(found[name], float(value)) if name == BUSY else found[name] + float(value)
    return found


# -- both --------------------------------------------------------------------------------------------------------------


def _installed(tool: str, setting: Setting) -> str:
    if setting.interpreted:
        raise NotRun(f"kernels are interpreted: {tool} has nothing to watch")
    if (path := shutil.which(tool)) is None:
        raise NotRun(f"{tool} is not installed")
    return path


def _around(tool: Sequence[str], setting: Setting, *words: str) -> str:
    """What a tool says of `bench.certify.attend` with these words."""
    command = [*tool, sys.executable, "-m", "bench.certify.attend", setting.device, TIMED, *words]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LONGEST, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise NotRun(f"{tool[0]} was stopped after {LONGEST:.0f} seconds") from error
    return done.stdout + done.stderr


def _last_line(said: str) -> str:
    return (said.strip().splitlines() or ["nothing"])[-1]
