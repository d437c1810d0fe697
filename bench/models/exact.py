"""How far an accelerated network is from the original: outputs and all gradients, random weights and biases."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from bench.models.zoo import Entry, Size
from bench.records import format_size
from bench.terminal import Table
from isa_triton.models import accelerate

FLOOR = 1e-2  # of the largest gradient: where the true one is zero, as of a key's bias, rounding must not decide


@dataclass(frozen=True)
class Errors:
    """The largest of a pass, relative to the largest entry of each tensor."""

    output: float
    gradient: float
    of: str  # the parameter with that gradient, or "input"


def compare(
    entry: Entry, size: Size, *, dtype: torch.dtype = torch.float64, training: bool = False, backend: str = "eager"
) -> Errors:
    """Both networks on one input.

    Raises:
        AssertionError: neither a parameter nor the input has a gradient.
    """
    theirs, inputs = network(entry, dtype, training), typed(entry.inputs(size), dtype)
    ours = accelerate(copy.deepcopy(theirs), backend=backend)
    expected = _pass(entry, theirs, inputs)
    errors = _errors(entry, expected, _pass(entry, ours, inputs))
    with torch.no_grad():  # which may go another way
        alone = _error(_result(entry, ours, inputs), expected[0], torch.finfo(dtype).tiny)
    return replace(errors, output=max(errors.output, alone))


def rounding(entry: Entry, size: Size) -> Errors:
    """What fp32 does to the original, in evaluation, for which no other is to blame.

    Raises:
        AssertionError: neither a parameter nor the input has a gradient.
    """
    theirs, inputs = network(entry, torch.float32), typed(entry.inputs(size), torch.float32)
    truth = _pass(entry, copy.deepcopy(theirs).double(), typed(inputs, torch.float64))
    return _errors(entry, truth, _pass(entry, theirs, inputs))


def network(entry: Entry, dtype: torch.dtype = torch.float64, training: bool = False) -> nn.Module:
    """One of an entry, whose biases, tables and scales of positions and layers matter."""
    torch.manual_seed(0)
    model = entry.make().to(dtype).train(training)
    for parameter in model.parameters():
        differs = parameter.numel() > 1 and parameter.std() > 0
        if parameter.dim() > 1 and parameter.abs().max() > 0.1 and differs:  # those of layers are random
            continue
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def typed(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Inputs with floating-point tensors in a dtype."""
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


Pass = tuple[Tensor, dict[str, Tensor]]


def _errors(entry: Entry, expected: Pass, actual: Pass) -> Errors:
    largest = max(float(gradient.abs().max()) for gradient in expected[1].values())
    assert largest > 0, f"{entry} has no gradient"
    gradients = {name: _error(actual[1][name], x, FLOOR * largest) for name, x in expected[1].items()}
    worst = max(gradients, key=lambda name: gradients[name])
    return Errors(_error(actual[0], expected[0], torch.finfo(expected[0].dtype).tiny), gradients[worst], worst)


def _pass(entry: Entry, model: nn.Module, inputs: tuple[Any, ...]) -> Pass:
    """The result, and the gradients of the first input and of all parameters that have one."""
    x = inputs[0].detach().clone().requires_grad_()
    y = _result(entry, model, (x, *inputs[1:]))
    y.backward(torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(y.dtype))
    gradients = {"input": x.grad} | {name: p.grad for name, p in model.named_parameters()}
    return y.detach(), {name: gradient for name, gradient in gradients.items() if gradient is not None}


def _result(entry: Entry, model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    torch.manual_seed(1)  # what drops paths in training drops the same
    return entry.result(model(*inputs))


def _error(actual: Tensor, expected: Tensor, floor: float) -> float:
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=floor))


@dataclass(frozen=True)
class Row:
    """A line of the CSV: a tiny network on one size."""

    package: str
    network: str
    size: str
    training: bool
    backend: str
    output: float  # the largest error, relative to the largest entry
    gradient: float  # the largest of all gradients
    of: str  # the parameter with that gradient, or "input"
    version: str  # of the package


def rows(entry: Entry) -> list[Row]:
    """An entry on all its sizes, in evaluation and in training, where maps lie and where they are copied."""
    found = []
    for size, training, backend in itertools.product(entry.sizes, (False, True), ("eager", "auto")):
        errors = compare(entry, size, training=training, backend=backend)
        what = entry.package, entry.name, format_size(size), training, backend
        found.append(Row(*what, errors.output, errors.gradient, errors.of, version(entry.package)))
    return found


def version(package: str) -> str:
    """Of the distribution that a package comes in."""
    return metadata.version({"aurora": "microsoft-aurora"}.get(package, package))


def table(found: Sequence[Row]) -> Table:
    """The largest errors of each network."""
    networks = dict.fromkeys((row.package, row.network) for row in found)
    lines = []
    for package, name in networks:
        of = [row for row in found if (row.package, row.network) == (package, name)]
        worst = max(row.output for row in of), max(row.gradient for row in of)
        sizes = ", ".join(dict.fromkeys(row.size for row in of))
        lines.append((package, name, sizes, *(f"{error:.1e}" for error in worst), of[0].version))
    header = ("package", "network", "inputs", "outputs", "gradients", "version")
    return Table("Largest relative errors in fp64, against the package's own", header, lines, words=3)


def sentence(found: Sequence[Row]) -> str:
    if not found:
        return ""
    return (
        f"{len(found)} passes: outputs within {max(row.output for row in found):.1e} of the packages' own,"
        f" gradients within {max(row.gradient for row in found):.1e}."
    )
