"""Every network that `accelerate` takes: the same function as its package's own, and a module like others."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch

from bench.models.exact import network, typed
from bench.models.zoo import PACKAGES, Entry, Size, entries
from isa_triton.models import accelerate, report, restore
from tests.accelerated_models import check_same_function

pytestmark = pytest.mark.filterwarnings(  # spandrel's own
    "ignore:torch.meshgrid", "ignore:'saved_variables'", "ignore:The tensor attribute"
)
ENTRIES: list[Entry] = []
MISSING = []  # packages, as parameters that say what to install
for package in PACKAGES:
    try:
        with warnings.catch_warnings(action="ignore"):  # of their imports
            ENTRIES += entries(package)
    except ImportError as error:
        MISSING.append(pytest.param(None, None, marks=pytest.mark.skip(reason=str(error)), id=package))
SIZES = [pytest.param(entry, size, id=f"{entry} {size}") for entry in ENTRIES for size in entry.sizes]
EVERY = pytest.mark.parametrize("entry", ENTRIES, ids=str)
GRAPHS = pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.is_graph], ids=str)


@pytest.mark.parametrize(("entry", "size"), [*SIZES, *MISSING])
def test_is_the_same_function(entry: Entry, size: Size) -> None:
    check_same_function(entry, size)


@EVERY
def test_is_a_module_like_others(entry: Entry) -> None:
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


@pytest.mark.slow
@GRAPHS
def test_is_one_graph(entry: Entry) -> None:
    """Compiled as a whole, in training, it is the same; in evaluation it is what is exported."""
    model = accelerate(network(entry, training=True), backend="eager")
    inputs = typed(entry.inputs(entry.sizes[0]), torch.float64)
    torch.manual_seed(0)
    expected = entry.result(model(*inputs))
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(entry.result(compiled(*inputs)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@GRAPHS
def test_is_exported(entry: Entry) -> None:
    """`torch.export` in evaluation."""
    model = accelerate(network(entry), backend="eager")
    inputs = typed(entry.inputs(entry.sizes[0]), torch.float64)
    with torch.no_grad():
        exported = torch.export.export(model, inputs).module()
        torch.testing.assert_close(entry.result(exported(*inputs)), entry.result(model(*inputs)), rtol=1e-9, atol=1e-9)
