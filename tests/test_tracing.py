"""Who is watching is found out in one file, `isa_triton/_tracing.py`, and found out right."""

from __future__ import annotations

import importlib
import sys
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from isa_triton import _tracing

PRIVATE = ("torch._C", "forward_ad._current_level", "_profiler_enabled", "torch._subclasses", "_dynamo_marked_constant")
PACKAGE = Path(_tracing.__file__).parent
PLAIN = torch.zeros(2)
LEAF = torch.zeros(2, requires_grad=True)


class Subclass(Tensor):
    """A tensor that may look at operators."""


def transformed(question: Any) -> Any:
    """The answer inside a transform of torch.func."""
    answers = list[Any]()

    def ask(x: Tensor) -> Tensor:
        answers.append(question())
        return x.sum()

    torch.func.grad(ask)(torch.zeros(2))
    return answers[0]


def within(question: Any, *contexts: AbstractContextManager[Any]) -> Any:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        return question()


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_that_tells_who_watches_is_used_in_one_file_only(name: str) -> None:
    users = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if name in path.read_text()]
    assert users == ["_tracing.py"]


def test_fake_tensors_are_those_of_a_fake_mode() -> None:
    with FakeTensorMode():
        fake = torch.zeros(2)
    assert _tracing.is_fake(fake)
    assert not _tracing.is_fake(PLAIN)
    assert not _tracing.is_fake(torch.zeros(2, device="meta"))


def test_transforms_are_seen_while_they_run() -> None:
    assert transformed(_tracing.is_transformed)
    assert not _tracing.is_transformed()


def test_dispatch_modes_are_seen_while_they_are_on() -> None:
    for mode in (FakeTensorMode(), FlopCounterMode(display=False)):
        assert within(_tracing.has_modes, mode)
        assert not _tracing.has_modes()


def test_what_is_differentiated_is_known_in_reverse_and_forward_mode_and_by_transforms() -> None:
    def of(*tensors: Tensor) -> Any:
        return lambda: _tracing.is_differentiated(list(tensors))

    assert within(of(PLAIN, LEAF))
    assert within(of(PLAIN), forward_ad.dual_level())
    assert transformed(of(PLAIN))
    assert not within(of(PLAIN))
    assert not within(of())
    assert not within(of(PLAIN, LEAF), torch.no_grad())


def test_operators_are_wanted_where_somebody_looks_at_them() -> None:
    def of(*tensors: Tensor) -> Any:
        return lambda: _tracing.wants_operators(list(tensors))

    assert within(of(PLAIN), FlopCounterMode(display=False))
    assert within(of(PLAIN), torch.autograd.profiler.profile())
    assert within(of(PLAIN, torch.zeros(2, device="meta")))
    assert within(of(PLAIN, torch.zeros(2).as_subclass(Subclass)))
    assert not within(of(PLAIN, LEAF, nn.Parameter(torch.zeros(2))))
    assert not within(of())


def test_inference_is_what_nobody_differentiates_casts_compiles_or_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    question = _tracing.is_inference
    assert within(question, torch.no_grad())
    assert within(question, torch.inference_mode())
    assert not within(question)
    assert not within(question, torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16))
    assert not within(question, torch.no_grad(), FlopCounterMode(display=False))
    assert not transformed(lambda: within(question, torch.no_grad()))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not within(question, torch.no_grad())


def test_what_is_known_of_open_sizes_holds_for_all_of_them_and_is_no_restriction() -> None:
    answers = list[bool]()

    class Ask(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n = 4 * x.shape[0]
            answers.extend(map(_tracing.is_known_to_be, (n % 4 == 0, n >= 1, n == 8, n > 8)))  # n is 8
            return x + n

    open_ = ({0: torch.export.Dim("n", min=1)},)
    program = torch.export.export(Ask(), (torch.zeros(2),), dynamic_shapes=open_)
    assert answers == [True, True, False, False]
    assert program.module()(torch.zeros(3)).tolist() == [12.0] * 3
    answers.clear()
    Ask()(torch.zeros(2))
    assert answers == [True, True, True, False]


def test_a_constant_of_a_graph_is_computed_once_while_compiling() -> None:
    calls = list[int]()

    @_tracing.constant_in_graphs
    def three() -> int:
        calls.append(len(calls))
        return 3

    compiled = torch.compile(lambda x: x + three(), backend="eager", fullgraph=True)
    assert [float(compiled(torch.zeros(()))) for _ in range(2)] == [3.0, 3.0]
    assert calls == [0]


def test_an_action_waits_until_its_module_has_been_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("awaited", "another"):
        (tmp_path / f"{name}_module.py").write_text("number = 3\n")
        monkeypatch.delitem(sys.modules, f"{name}_module", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    finders, numbers = list(sys.meta_path), list[int]()

    def action(module: ModuleType) -> None:
        numbers.append(module.number)

    _tracing.when_imported("awaited_module", action)
    importlib.import_module("another_module")
    assert numbers == []
    awaited = importlib.import_module("awaited_module")
    assert numbers == [3]
    assert sys.meta_path == finders
    _tracing.when_imported("awaited_module", action)  # which is imported by now
    assert numbers == [3, 3]
    assert importlib.reload(awaited) is awaited
    assert numbers == [3, 3]
