"""Our kernels on the machine: cases with tiles of their own, shipped tiles, and their errors as parts of the budget.

Forward and backward are launched by the library's own launchers, on outputs full of NaN.
"""

from __future__ import annotations

import time
from math import inf, isnan
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from bench.cases import NAMES, derivatives
from bench.ptx_machine.driver import Device, installed
from bench.ptx_machine.faults import Fault, Unsupported
from bench.ptx_machine.problems import Work
from bench.ptx_machine.results import Row, made_by
from isa_triton.backend.kernels import launch, plan
from isa_triton.backend.triton import in_whole_rows
from reference.budget import allowed_error, natural_scales


def check(work: Work) -> Row:
    """One line."""
    with installed(work.target) as device:
        began, fault, parts = time.perf_counter(), "", dict[str, float]()
        try:
            parts = errors(work)
        except (Fault, Unsupported) as error:
            fault = f"{type(error).__name__}: {error}"
        return row(work, device, parts, fault, time.perf_counter() - began)


def row(work: Work, device: Device, parts: dict[str, float], fault: str, seconds: float) -> Row:
    """The line of a check and its launches."""
    given: Any = Row
    done, errors_ = device.executions, [round(parts[name], 4) if name in parts else None for name in NAMES]
    kernels = " ".join(dict.fromkeys(each.kernel for each in done))
    count = sum(sum(each.instructions.values()) for each in done)
    notes = "; ".join(sorted({f"{each.kernel}: {note}" for each in done for note in each.notes}))
    counted = len(done), count, round(seconds, 1)
    return given(work.target, work.name, work.arithmetic, work.tiles, len(work.entries), *errors_, kernels, *counted,
                 fault, notes, made_by())  # fmt: skip


def errors(work: Work) -> dict[str, float]:
    """The error of each output and gradient, as a part of what the budget allows; of each head its own, the largest."""
    case, inputs = work.case, work.case.inputs()
    inputs["q"][:, :, :, 1:] /= case.logits  # a peaked softmax hides what a flat one shows, and the other way round
    if not work.dlse:
        inputs["dlse"] = torch.zeros_like(inputs["dlse"])
    with patch.object(plan, "IN_TURNS", work.in_turns):
        results = launched(work, inputs)
    exact = derivatives({name: x.double() for name, x in inputs.items()}, case)
    rounded = torch.float16 if work.arithmetic == "tf32" else case.dtype  # tf32 has as many bits
    eager = derivatives({name: x.to(rounded) for name, x in inputs.items()}, case)
    of_scores = torch.finfo(rounded if work.arithmetic == "tf32" else torch.float32)
    parts = dict.fromkeys((name for name, _ in results), 0.0)
    for head in range(case.heads):
        of_head = {name: of(head, name, x) for name, x in inputs.items()}
        natural = natural_scales(of_head, case.scale, case.maps * case.partition.groups)
        uncertain = of_scores.eps * float(of(head, "lse", exact["lse"]).abs().max())
        for name, result in results:
            true, plain, found = (of(head, name, x) for x in (exact[name], eager[name], result))
            allowed = allowed_error(name, true, plain, rounded, natural.get(name, 0.0), uncertain)
            part = float((found.double() - true).abs().max()) / allowed
            parts[name] = max(parts[name], inf if isnan(part) else part)
    return parts


def of(head: int, name: str, x: Tensor) -> Tensor:
    """One head of a tensor: heads come first in a bias, and else behind the pixels."""
    return x[head : head + 1] if name in ("bias", "dbias") else x[:, :, :, head : head + 1]


def launched(work: Work, inputs: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Outputs and gradients by the launchers; of cases out twice, the second time of a pass that does not write lse."""
    case, nan, precision = work.case, float("nan"), "tf32" if work.arithmetic == "tf32" else "ieee"
    partition, tiles = case.partition, work.backward
    q, k, v, do = (inputs[name] for name in ("q", "k", "v", "do"))
    bias, dlse = inputs.get("bias"), inputs["dlse"] if work.dlse else None
    out, alone, dq, dk, dv = (torch.full(x.shape, nan, dtype=x.dtype) for x in (v, v, q, k, v))
    lse, delta = (torch.full(q.shape[:4], nan) for _ in range(2))
    partials: Any = None
    if bias is not None:
        partials = torch.full(plan.bias_partials_shape(case.maps, case.heads, partition, tiles), nan)
    passes: list[tuple[Tensor, Tensor | None]] = [(out, lse)] if work.entries else [(out, lse), (alone, None)]
    for to, logs in passes:
        rows = in_whole_rows(bias, plan.in_one_block(work.forward, partition))
        launch.forward(q, k, v, rows, to, logs, case.scale, partition, work.forward, precision)
    saved = (None, None, None) if plan.in_one_kernel(tiles, partition) else (out, lse, delta)
    run: Any = launch.backward
    run(q, k, v, in_whole_rows(bias), *saved[:2], do, dlse, dq, dk, dv, saved[2], partials, case.scale, partition,
                    tiles, precision)  # fmt: skip
    results = [*(("out", to) for to, _ in passes), ("lse", lse), ("dq", dq), ("dk", dk), ("dv", dv)]
    return results if partials is None else [*results, ("dbias", partials.sum(0))]
