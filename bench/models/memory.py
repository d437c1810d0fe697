"""What a network holds and moves, as it is and accelerated, counted on fake tensors of any size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from bench.measure import Counter
from bench.models.networks import Network
from bench.models.zoo import Size
from bench.records import format_size, short
from bench.terminal import Table
from bench.tiles.roofline import MACHINES
from isa_triton.models import accelerate

_MOVE_NOTHING = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view")
GPU = MACHINES["H100"]
THEIRS, OURS = "original", "accelerated"


@dataclass(frozen=True)
class Row:
    """A line of the CSV: a pass of a network in fp32."""

    package: str
    network: str
    size: str
    pass_: str  # forward or training
    who: str
    flops: int
    peak_bytes: int  # with weights, and in training their gradients
    moved_bytes: int  # as if every operator read what it takes, and wrote what it makes, once
    predicted_ms: float  # on an H100 by its data sheet: every operator at its DRAM or its tf32 products; no launches


class Traffic(Counter):
    """`Counter`, and what operators move."""

    def __init__(self) -> None:
        super().__init__()
        self.moved_bytes, self.seconds = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        before = self.flops
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if func.namespace != "prim" and not (func.is_view or func._schema.name.startswith(_MOVE_NOTHING)):
            tensors = {id(x): x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
            moved = sum(_bytes(x) for x in tensors.values())
            self.moved_bytes += moved
            self.seconds += max(moved / GPU.dram, (self.flops - before) / GPU.matrix["tf32"])
        return result


def _bytes(x: Tensor) -> int:
    """Of the elements that lie in memory: an expanded tensor has fewer than it shows."""
    distinct = 1
    for extent, stride in zip(x.shape, x.stride(), strict=True):
        distinct *= extent if stride else 1
    return distinct * x.element_size()


def rows(network: Network) -> list[Row]:
    """A network on all its sizes."""
    found = []
    for size in network.sizes:
        for training in (False, True):
            for who in (THEIRS, OURS):
                traffic = count(network, size, training, who == OURS)
                what = network.package, network.name, format_size(size), "training" if training else "forward", who
                counted = traffic.flops, traffic.peak_bytes, traffic.moved_bytes, 1e3 * traffic.seconds
                found.append(Row(*what, *counted))
    return found


def count(network: Network, size: Size, training: bool, ours: bool) -> Traffic:
    """One pass: weights and the input made, forward, and in training backward."""
    model = network.make().train(training)
    if ours:
        accelerate(model, backend="triton")
    with FakeTensorMode(allow_non_fake_inputs=True), Traffic() as traffic, torch.set_grad_enabled(training):
        model.to_empty(device="cpu")
        x = network.input(size)
        traffic.flops, traffic.moved_bytes, traffic.seconds = 0, 0, 0.0
        y = network.result(model(x))
        if training:
            y.backward(torch.ones_like(y))
    return traffic


def table(found: Sequence[Row]) -> Table:
    """Original beside accelerated."""
    lines = []
    for theirs, ours in zip(found[::2], found[1::2], strict=True):
        pairs = [
            (theirs.peak_bytes / 2**20, ours.peak_bytes / 2**20),
            (theirs.moved_bytes / 2**30, ours.moved_bytes / 2**30),
            (theirs.predicted_ms, ours.predicted_ms),
        ]
        cells = [cell for pair in pairs for cell in (*map(short, pair), f"{pair[0] / pair[1]:.2f}")]
        lines.append((theirs.network, theirs.size, theirs.pass_, *cells))
    columns = "network", "input", "pass", "MiB", "ours", "ratio", "GiB moved", "ours", "ratio", "PREDICTED ms"
    header = (*columns, "ours", "ratio")
    return Table("Peak bytes and traffic in fp32, counted, the original and accelerated", header, lines, words=3)


def sentence(found: Sequence[Row]) -> str:
    """From the least to the most that is saved."""
    spans = []
    for pass_ in ("forward", "training"):
        of = [row for row in found if row.pass_ == pass_]
        ratios = sorted(theirs.peak_bytes / ours.peak_bytes for theirs, ours in zip(of[::2], of[1::2], strict=True))
        if ratios:
            spans.append(f"{ratios[0]:.2f} to {ratios[-1]:.2f} in {'inference' if pass_ == 'forward' else pass_}")
    return f"The original's peak of bytes is {', '.join(spans)} times ours." if spans else ""
