"""Part a: the device, what it can do at most, and what our kernels are there after compiling."""

from __future__ import annotations

import platform
import statistics
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench import devices, measure
from bench.cases import multiplied_as_tf32
from bench.certify import problems, speed
from bench.certify.rows import Found, Name, NotRun, Setting

COPIED = 2**30  # bytes
SIDE = 8192  # of the matrices
MATMULS = ("bfloat16", "float16", "tf32", "float32")


def items(setting: Setting) -> list[Name]:
    return [("device",), ("binaries",), ("copy",), *((f"matmul {dtype}",) for dtype in MATMULS)]


def run(setting: Setting, name: str) -> Found:
    what, _, dtype = name.partition(" ")
    known: dict[str, Callable[..., Found]] = {
        "device": device, "binaries": binaries, "copy": copy, "matmul": partial(matmul, dtype)
    }  # fmt: skip
    return known[what](setting)


def device(setting: Setting) -> Found:
    """What it is, and what drives it."""
    conditions = measure.conditions(setting.device)
    said: dict[str, Any] = {"name": conditions["host"], "versions": conditions["versions"], "day": conditions["date"],
                            "python": platform.python_version()}  # fmt: skip
    if not setting.interpreted:
        properties = torch.get_device_module(setting.device).get_device_properties(setting.device)
        said |= {
            "target": speed.target_of(setting), "SMs": properties.multi_processor_count,
            "GB": round(devices.memory(setting.device) / 1e9, 1), "clocks": devices.clocks(setting.device),
            "CUDA": torch.version.cuda or torch.version.hip, "driver": driver(),
        }  # fmt: skip
    return Found("measured", "", said)


def driver() -> str:
    """The driver's version, as nvidia-smi says it; nothing where there is none to ask."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ", ".join(dict.fromkeys(done.stdout.split("\n"))).strip(", ")


def binaries(setting: Setting) -> Found:
    """Everything that is launched later is compiled, into the cache that the run time looks in, and its code read."""
    target = speed.target(setting)
    shapes = setting.shapes[:1] if setting.interpreted else setting.shapes
    wanted = {
        launch.key: launch
        for shape in shapes
        for dtype in ((problems.TIMED,) if setting.interpreted else problems.dtypes(setting, shape))
        for launch in speed.launches(setting, shape, dtype)
    }
    verdicts = speed.binaries(setting).verdicts(wanted.values())
    wrong = [f"{v.launch.problem.name} {v.launch.problem.dtype} {v.launch.label} {'; '.join(v.violations)}"
             for v in verdicts if v.violations]  # fmt: skip
    spills = sum(v.binary is not None and v.binary.spill_accesses > 0 for v in verdicts)
    figures = {"target": target, "binaries": len(verdicts), "with spills": spills}
    return Found.judged(", ".join(wrong), **figures)


def copy(setting: Setting) -> Found:
    """How fast memory is read and written."""
    source = torch.zeros(_of_device(setting, COPIED), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    return _rate(setting, lambda: target.copy_(source), 2 * source.nbytes, 1e9, "GB/s")


def matmul(dtype: str, setting: Setting) -> Found:
    """How fast the matrix units of torch's own products are."""
    side = _of_device(setting, SIDE)
    a = torch.randn(side, side, device=setting.device, dtype=problems.DTYPES[dtype])
    with multiplied_as_tf32(dtype == "tf32"):
        return _rate(setting, lambda: a @ a, 2 * side**3, 1e12, "TFLOP/s")


def _of_device(setting: Setting, size: int) -> int:
    if setting.interpreted:
        raise NotRun("times of a CPU say nothing of the kernels")
    return size


def _rate(setting: Setting, call: Callable[[], object], amount: int, unit: float, name: str) -> Found:
    timer = devices.Timer(setting.device)
    seconds = statistics.median(timer.seconds(call, speed.SAMPLES))
    figures = {name: round(amount / seconds / unit, 1), "how": timer.how, "clocks": devices.clocks(setting.device)}
    return Found("measured", "", figures)
