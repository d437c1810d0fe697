"""What tests of accelerated networks share: the entries of a package, and that ours is the same function."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from bench.models.exact import compare, rounding
from bench.models.zoo import Entry, Size, entries

DTYPES = {torch.float64: 1e-10, torch.float32: 1e-5}


def zoo(package: str) -> tuple[Entry, ...]:
    """The entries of a package; the test file is skipped, with what to install, where it is missing."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of their imports
            return entries(package)
    except ImportError as error:
        pytest.skip(str(error), allow_module_level=True)


def check_same_function(entry: Entry, size: Size) -> None:
    """Where maps lie and where they are copied, in evaluation and in training."""
    for backend, training in itertools.product(("eager", "auto"), (False, True)):
        errors = compare(entry, size, training=training, backend=backend)
        assert max(errors.output, errors.gradient) < DTYPES[torch.float64], (backend, training, errors)
    errors = compare(entry, size, dtype=torch.float32)
    if max(errors.output, errors.gradient) > DTYPES[torch.float32]:  # a deep network magnifies anybody's rounding
        theirs = rounding(entry, size)  # ours may be as wrong as the error budget says, on the other side
        assert errors.output < max(DTYPES[torch.float32], (1 + 2) * theirs.output), (errors, theirs)
        assert errors.gradient < max(DTYPES[torch.float32], (1 + 3) * theirs.gradient), (errors, theirs)
