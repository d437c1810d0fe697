"""Random attentions, drawn and shrunk by hypothesis, against the formula in fp64 within the error budget.

Every run draws the same few; ISA_TRITON_SWEEP=N draws N for each backend with a new seed, which pytest's header names
and ISA_TRITON_SEED repeats.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from bench.cases import Case, errors, strategy
from tests import conftest, guard

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SWEEP, SEED = int(os.environ.get("ISA_TRITON_SWEEP", 0)), int(os.environ.get("ISA_TRITON_SEED", 0))


def drawn(examples: int, largest: int, compiled: bool = False) -> Any:
    """A test over cases on maps of up to `largest` pixels a side; those of few widths where each is compiled."""

    def decorate(test: Any) -> Any:
        phases = (Phase.explicit, Phase.generate, Phase.shrink)
        limits = settings(
            max_examples=SWEEP or examples, deadline=None, database=None, phases=phases,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        return seed(SEED)(limits(given(strategy(DTYPES, largest, compiled=compiled))(test)))

    return decorate


@drawn(200, largest=16)
def test_the_eager_backend_keeps_the_budget(case: Case) -> None:
    within_budget(case, "eager")


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@drawn(12, largest=6, compiled=guard.COMPILED)
def test_the_kernels_keep_the_budget(case: Case) -> None:
    with guard.watch(), np.errstate(all="ignore"):  # of keys that are forbidden
        within_budget(case, "triton", guard.DEVICE)


def within_budget(case: Case, backend: str, device: str = "cpu") -> None:
    parts = errors(case, backend, device)
    assert all(part <= 1 for part in parts.values()), parts


def test_a_sweep_has_a_new_seed_that_workers_inherit_and_the_header_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISA_TRITON_SWEEP", "30")
    seeds = set()
    for _ in range(2):
        monkeypatch.delenv("ISA_TRITON_SEED", raising=False)
        conftest.choose_seed()
        seeds.add(chosen := os.environ["ISA_TRITON_SEED"])
        conftest.choose_seed()  # as a worker does
        assert conftest.pytest_report_header() == [f"ISA_TRITON_SWEEP=30 ISA_TRITON_SEED={chosen}"]
    assert len(seeds) == 2
    monkeypatch.setenv("ISA_TRITON_SEED", "five")
    with pytest.raises(pytest.UsageError, match="ISA_TRITON_SEED must be a whole number, got 'five'"):
        conftest.choose_seed()


def test_without_a_sweep_every_run_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ISA_TRITON_SWEEP", "ISA_TRITON_SEED"):
        monkeypatch.delenv(name, raising=False)
    conftest.choose_seed()
    assert os.environ["ISA_TRITON_SEED"] == "0"
    assert conftest.pytest_report_header() == []
