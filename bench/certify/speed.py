"""Parts e and g: how long the kernels and their peers take on the device, and how long they were predicted to take.

Times are those of `bench.devices`: graphs replayed from a cold cache, with the clocks that the driver reports. Whoever
is timed has computed the same before, to within a sixteenth: another function is no peer.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from bench import devices, measure
from bench.certify import problems
from bench.certify.peers import OURS, PEERS, Peer
from bench.certify.problems import TIMED, Tensors
from bench.certify.rows import Found, Name, NotRun, Setting
from bench.tiles import options, report
from bench.tiles.binaries import LIMITS, Binaries
from bench.tiles.compile import Launch, Problem, pass_launches
from bench.tiles.roofline import MACHINES, Machine
from bench.tiles.verify import SHAPES
from isa_triton.backend import triton

PASSES = ("forward", "training")
SAMPLES = 21
QUERIES = 2**26  # numbers in a batch's queries, at most
INTERPRETED = ("Swin 49", "MaxViT 49", "HRFormer 49")  # shapes: local, interlaced, ragged, all with a bias
SAME = 1 / 16  # of the norm: two roundings to bf16 of every probability and a sum of them are far less
WITHOUT_A_GPU = MACHINES["H100"]  # what is predicted then
SLOWER = 1.05  # times a peer's seconds: less is the same


def maps_of(shape: str) -> int:
    """Of a batch that fills a GPU, with room for all scores of it."""
    found = SHAPES[shape]
    queries = math.prod(found.partition.size) * found.heads * found.key_width  # of one map
    return 1 if found.partition.groups == 1 else max(1, min(64, QUERIES // queries))


def timed(setting: Setting, shape: str) -> Problem:
    """The problem whose times are measured and predicted."""
    if setting.interpreted:
        return problems.problem(setting, shape, "float32")
    return problems.problem(setting, shape, TIMED, maps_of(shape))


# -- e: measured -------------------------------------------------------------------------------------------------------


def items(setting: Setting) -> list[Name]:
    shapes = [shape for shape in setting.shapes if not setting.interpreted or shape in INTERPRETED]
    return [(shape, pass_, who) for shape in shapes for pass_ in PASSES for who in PEERS]


def run(setting: Setting, shape: str, pass_: str, who: str) -> Found:
    problem, peer = timed(setting, shape), PEERS[who]
    if obstacle := peer.obstacle(problem):
        raise NotRun(obstacle)
    tensors = Tensors.of(problem, setting.device)
    call, ours = (calls(each, problem, tensors, pass_) for each in (peer, PEERS[OURS]))
    with devices.stream(setting.device):
        try:
            results = call()
        except Exception as error:
            if who == OURS:
                raise
            raise NotRun(measure.in_a_line(error)) from error
        if who != OURS and not (distance := relative(results, ours())) < SAME:
            raise NotRun(f"computes something else: {distance:.2g} of the norm away")
        del results
    if setting.interpreted:
        return Found("passed", "computes the same; times of interpreted kernels say nothing")
    timer = devices.Timer(setting.device)
    seconds = timer.seconds(call, SAMPLES)
    figures = {
        "us": round(1e6 * statistics.median(seconds), 1), "spread": f"{measure.spread(seconds):.0%}",
        "samples": len(seconds), "how": timer.how, "clocks": devices.clocks(setting.device),
    }  # fmt: skip
    return Found("measured", "", figures)


def calls(peer: Peer, problem: Problem, tensors: Tensors, pass_: str) -> Callable[[], tuple[Tensor, ...]]:
    """Forward without gradients, or forward and the gradients of all inputs."""

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (peer.attend(problem, tensors),)

    def training() -> tuple[Tensor, ...]:
        out = peer.attend(problem, tensors)
        return out.detach(), *torch.autograd.grad(out, tensors.leaves, tensors.do)

    return forward if pass_ == "forward" else training


def relative(results: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest distance of a result from what is wanted, as a part of the norm."""
    distances = (torch.dist(x.float(), y.float()) / y.float().norm() for x, y in zip(results, wanted, strict=True))
    return float(torch.stack(list(distances)).nan_to_num(torch.inf).max())


def beside_peers(rows: Mapping[Name, Found]) -> dict[Name, Found]:
    """The rows of part e, where ours says by how much it is slower than the fastest peer of its shape and pass."""
    times = {name: found.figures["us"] for name, found in rows.items() if "us" in found.figures}
    judged = dict(rows)
    for (shape, pass_, who), ours in times.items():
        others = {other: us for (*where, other), us in times.items() if where == [shape, pass_] and other != OURS}
        if who == OURS and others:
            fastest = min(others, key=others.__getitem__)
            ratio, row = ours / others[fastest], rows[shape, pass_, who]
            said = f"{ratio:.2f} times the time of {fastest}, {PEERS[fastest].title}"
            judged[shape, pass_, who] = replace(row, outcome="slower" if ratio > SLOWER else "measured", why=said)
    return judged


# -- g: predicted ------------------------------------------------------------------------------------------------------


def predictions(setting: Setting) -> list[Name]:
    return [(shape, pass_) for shape in setting.shapes[: 1 if setting.interpreted else None] for pass_ in PASSES]


def predict(setting: Setting, shape: str, pass_: str) -> Found:
    gpu = machine(setting)
    problem = replace(timed(setting, shape), dtype=TIMED)
    launches = pass_launches(gpu.target, problem, "forward", training=pass_ == "training")
    if pass_ == "training":
        launches += pass_launches(gpu.target, problem, "backward")
    kernels = report.kernels(launches, gpu, binaries(setting))
    parts = ", ".join(f"{kernel.launch.label} {1e6 * kernel.prediction.seconds:.1f}" for kernel in kernels)
    total = sum(kernel.prediction.seconds for kernel in kernels)
    return Found("measured", "", {"predicted us": round(1e6 * total, 1), "kernels": parts, "rates of": gpu.name})


def machine(setting: Setting) -> Machine:
    """The GPU in the table of data sheets.

    Raises:
        NotRun: it is not in there.
    """
    if setting.interpreted:
        return WITHOUT_A_GPU
    device = torch.device(setting.device)
    name, of = torch.get_device_module(device).get_device_name(device), target_of(setting)
    for known in MACHINES.values():
        words = r"\s?".join(re.findall(r"[A-Z]+|\d+", known.name))
        if known.target == of and re.search(rf"\b{words}\b", name):
            return known
    raise NotRun(f"{name} ({of}) is not among the data sheets: {', '.join(MACHINES)}")


def target_of(setting: Setting) -> str:
    """What kernels are compiled for: without a GPU for the one that is predicted."""
    return WITHOUT_A_GPU.target if setting.interpreted else triton.target_of(torch.device(setting.device))


def target(setting: Setting) -> str:
    """The same, where its binaries can be judged.

    Raises:
        NotRun: nothing is known of what an SM of it holds.
    """
    found = target_of(setting)
    if found not in LIMITS:
        raise NotRun(f"what an SM of {found} holds is not known, but of {', '.join(LIMITS)}")
    return found


@cache
def binaries(setting: Setting) -> Binaries:
    """Kept with those of the workbench; one compiler at a time needs no process."""
    pool: Executor = ThreadPoolExecutor(1) if setting.jobs == 1 else options.pool(setting.jobs)
    return Binaries(Path(setting.cache), pool)


def launches(setting: Setting, shape: str, dtype: str) -> list[Launch]:
    """What forward and training launch for a shape."""
    chosen = replace(timed(setting, shape), dtype=dtype)
    forward = [pass_launches(target(setting), chosen, "forward", training) for training in (False, True)]
    return [*forward[0], *forward[1], *pass_launches(target(setting), chosen, "backward")]
