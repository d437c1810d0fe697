"""What every accelerated network has to be: the same function, and a module like others. Of `bench.models.zoo`."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Sequence

import pytest
import torch

from bench.models.exact import compare, network, rounding, typed
from bench.models.zoo import Entry, Size, entries
from isa_triton.models import accelerate, report, restore

DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}


def zoo(package: str) -> tuple[Entry, ...]:
    """The entries of a package; the test file is skipped, with what to install, where it is missing."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of their imports
            return entries(package)
    except ImportError as error:
        pytest.skip(str(error), allow_module_level=True)


def sizes(of: Sequence[Entry]) -> list[object]:
    """Every entry with every one of its sizes, as parameters of a test."""
    return [pytest.param(entry, size, id=f"{entry.name} {size}") for entry in of for size in entry.sizes]


def check_same_function(entry: Entry, size: Size) -> None:
    """Where maps lie and where they are copied, in evaluation and in training."""
    for backend, training in itertools.product(("eager", "auto"), (False, True)):
        errors = compare(entry, size, training=training, backend=backend)
        assert max(errors.output, errors.gradient) < DTYPES[torch.float64], (backend, training, errors)
    errors = compare(entry, size, dtype=torch.float32)
    if max(errors.output, errors.gradient) > DTYPES[torch.float32]:  # a deep network magnifies anybody's rounding
        theirs = rounding(entry, size)
        assert errors.output < 2 * theirs.output, (errors, theirs)
        assert errors.gradient < 2 * theirs.gradient, (errors, theirs)


def check_module_like_others(entry: Entry) -> None:
    """Restored, copied, pickled, loaded; its report names what is taken."""
    model, inputs = network(entry), typed(entry.inputs(entry.sizes[0]), torch.float64)
    classes, state = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = entry.result(model(*inputs))
        assert not any(finding.taken for finding in report(model))
        assert accelerate(model) is model
        assert any(finding.taken for finding in report(model))
        assert [type(module) for module in model.modules()] != classes
        model.load_state_dict(state)
        after = entry.result(model(*inputs))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(entry.result(other(*inputs)), after)
        assert restore(model) is model
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(entry.result(model(*inputs)), before)


def check_one_graph(entry: Entry) -> None:
    """Compiled as a whole, in evaluation and in training, it is the same."""
    for training in (False, True):
        model = accelerate(network(entry, training=training), backend="eager")
        inputs = typed(entry.inputs(entry.sizes[0]), torch.float64)
        torch.manual_seed(0)
        expected = entry.result(model(*inputs))
        torch.manual_seed(0)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(entry.result(compiled(*inputs)), expected, rtol=1e-9, atol=1e-9)


def check_exported(entry: Entry) -> None:
    """`torch.export` in evaluation."""
    model = accelerate(network(entry), backend="eager")
    inputs = typed(entry.inputs(entry.sizes[0]), torch.float64)
    with torch.no_grad():
        exported = torch.export.export(model, inputs).module()
        torch.testing.assert_close(entry.result(exported(*inputs)), entry.result(model(*inputs)), rtol=1e-9, atol=1e-9)
