"""How long a network takes on a device, as it is and accelerated, each twice in one interleaved run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from bench import measure
from bench.models.networks import Network
from bench.records import format_size, short
from bench.terminal import Table
from isa_triton.models import accelerate

WHO = ("original", "original again", "accelerated", "accelerated again")


@dataclass(frozen=True)
class Row:
    """A line of the CSV."""

    package: str
    network: str
    size: str
    pass_: str  # forward or training
    who: str
    seconds: float  # the median
    times: float  # as fast as the original
    rounds: int
    how: str
    host: str
    threads: int
    versions: str


def rows(network: Network, rounds: int, device: str) -> list[Row]:
    """A network in inference and in training."""
    conditions, found = measure.conditions(device), []
    x = network.input(network.timed, device)
    for pass_ in ("forward", "training"):
        theirs = network.make().to(device).train(pass_ == "training")
        models = {who: copy.deepcopy(theirs) for who in WHO}
        steps = {who: _step(network, model, x, pass_, who) for who, model in models.items()}
        timed = measure.samples(steps, rounds=rounds, budget=float("inf"), device=device)
        seconds = {who: median(each.seconds) for who, each in timed.items()}
        what = network.package, network.name, format_size(network.timed), pass_
        for who, each in timed.items():
            measured = seconds[who], seconds[WHO[0]] / seconds[who], len(each.seconds), each.how
            found.append(Row(*what, who, *measured, *(conditions[name] for name in ("host", "threads", "versions"))))
    return found


def _step(network: Network, model: torch.nn.Module, x: torch.Tensor, pass_: str, who: str) -> measure.Step:
    if who.startswith("accelerated"):
        accelerate(model)

    def call() -> torch.Tensor:
        return network.result(model(x))

    if pass_ == "forward":
        return measure.forward(call)
    with torch.no_grad():
        upstream = torch.ones_like(call())
    return measure.training(call, list(model.parameters()), upstream)


def table(found: Sequence[Row]) -> Table:
    """A line for each network and pass: ms of the original, and how many times as fast the others are."""
    lines = []
    for i in range(0, len(found), len(WHO)):
        first, *others = found[i : i + len(WHO)]
        lines.append(
            (first.network, first.size, first.pass_, short(1e3 * first.seconds), *(f"{x.times:.2f}" for x in others))
        )
    header = ("network", "input", "pass", "ms", "again", "accelerated", "again")
    return Table("Milliseconds of the original, and how many times as fast", header, lines, words=3)


def sentence(found: Sequence[Row]) -> str:
    """The slowest and the fastest, the better half of noise shown beside it."""
    ours = [row.times for row in found if row.who == WHO[2]]
    noise = [abs(row.times - 1) for row in found if row.who == WHO[1]]
    if not ours:
        return ""
    return (
        f"Accelerated networks are {min(ours):.2f} to {max(ours):.2f} times as fast as the originals in one interleaved"
        f" run, in which two runs of an original differ by up to {max(noise):.0%}."
    )
