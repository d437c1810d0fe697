"""What tests of the kernels share: cases by their groups, tiles, launches on poisoned memory, the error budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from bench.cases import Case, Pair, Size, derivatives, laid_out
from isa_triton.backend.kernels import launch, plan
from isa_triton.tiles import BackwardTiles, Tile
from reference.budget import allowed_error, natural_scales
from tests import guard

# How a group is cut: into one block, or into many where it has more than 16 tokens, the smallest block. In "whole
# groups" a block of queries has all keys before it at once, and one of keys all queries. "split": dk and dv are passes
# of their own. "columns": dq, dk and dv come from one kernel, which has all queries on chip and keys block by block.
FORMS = ("one block", "many blocks", "whole groups", "many blocks, split", "whole groups, split", "columns")


def of_groups(
    kind: str, tokens: Size, groups: Size, short: Size | None = None, widths: Pair = (32, 32), **rest: Any
) -> Case:
    """The case on a map of `groups` groups of `tokens` tokens that lacks `short` pixels at its far ends.

    Where windows are shifted, it also lacks the first pixels of the first groups.
    """
    none = (0,) * len(tokens)
    shift, cyclic = rest.get("shift", none), rest.get("cyclic", none)
    of_axes = zip(tokens, groups, short or none, shift, cyclic, strict=True)
    size = tuple(t * g - s - (0 if seam else -d % t) for t, g, s, d, seam in of_axes)
    case = Case(kind, size, groups if kind == "interlaced" else tokens, widths, **{"maps": 1, "logits": 3.0} | rest)
    assert [(axis.tokens, axis.groups) for axis in case.partition] == list(zip(tokens, groups, strict=True))
    return case


def tiles_of(form: str, tokens: int) -> tuple[Tile, BackwardTiles]:
    """Tiles of forward and backward that cut groups of so many tokens as `form` says."""
    block = max(16, 1 << (tokens - 1).bit_length())
    if form == "one block":
        tile = Tile(block, block, 64, 32)
        return tile, BackwardTiles(tile, tile, tile, None, tile)
    columns = None
    if form.startswith("whole groups") or form == "columns":
        small = max(16, block // 4)
        forward, pairs = Tile(small, block, 64, 64), Tile(block, small, 64, 64)
        queries, keys = Tile(small, block, 32, 128), Tile(block, small, 128, 32)
        columns = Tile(block, small, 128, 128) if form == "columns" else None
    else:
        large = max(16, min(block // 2, 128))
        small = large if large <= 32 else large // 2
        forward, pairs = Tile(large, small, 64, 512), Tile(large, large, 64, 64)
        queries, keys = Tile(large, small, 128, 64), Tile(small, large, 64, 512)
    values = keys if form.endswith("split") else None
    return forward, BackwardTiles(None, queries, keys, values, pairs, columns)


def inputs_of(case: Case) -> dict[str, Tensor]:
    """The case's q, k, v, bias, do and dlse; to expanded inputs comes the gradient of a sum, one number everywhere."""
    inputs = case.inputs(guard.DEVICE)
    if case.layout == "expanded":
        inputs |= {name: inputs[name].flatten()[0].expand(inputs[name].shape) for name in ("do", "dlse")}
    return inputs


def poisoned(like: Tensor, layout: str) -> Tensor:
    """An output, laid out as the inputs are unless elements share memory there, all NaN."""
    layout = "contiguous" if layout in ("expanded", "scalar") else layout
    return laid_out(layout, tuple(like.shape), lambda *sizes: torch.full(sizes, float("nan"), dtype=like.dtype))


def launched(case: Case, tiles: tuple[Tile, BackwardTiles], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Forward and backward on poisoned outputs; all of them must come back written."""
    q, k, v, do, dlse = (inputs[name] for name in ("q", "k", "v", "do", "dlse"))
    bias, partition, (tile, backward), nan = inputs.get("bias"), case.partition, tiles, float("nan")
    out, dq, dk, dv = (poisoned(x, case.layout) for x in (v, q, k, v))
    lse, delta = (torch.full(q.shape[:4], nan) for _ in range(2))
    partials = None
    if bias is not None:
        partials = torch.full(plan.bias_partials_shape(case.maps, case.heads, partition, backward), nan)
    one = plan.in_one_kernel(backward, partition)
    assert one == (backward.group is not None)

    with guard.watch() as memory, _fitting():
        launch.forward(q, k, v, bias, out, lse, case.scale, partition, tile)
        saved = (None, None, None) if one else (out, lse, delta)
        launch.backward(q, k, v, bias, *saved[:2], do, dlse, dq, dk, dv, saved[2], partials,
                        case.scale, partition, backward)  # fmt: skip
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    for name, result in results.items():
        assert memory.unwritten(result) == 0, name
    if partials is not None:
        results["dbias"] = partials.sum(0)
    assert [name for name, result in results.items() if result.isnan().any()] == []
    return results


@contextmanager
def _fitting() -> Iterator[None]:
    """Skips a test whose tile a GPU has no room for: tiles of tests are those of no GPU."""
    try:
        yield
    except OutOfResources as error:
        pytest.skip(f"a tile of this test does not fit on {guard.DEVICE}: {error}")


def formula(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Outputs and gradients by the formula in one precision, in fp64."""
    results = derivatives({name: x.to(dtype) for name, x in inputs.items()}, case)
    return {name: x.double() for name, x in results.items()}


def assert_within_budget(
    case: Case, tiles: tuple[Tile, BackwardTiles], inputs: dict[str, Tensor] | None = None
) -> None:
    """Of the case's inputs, or of those given.

    Scores are fp32, known to eps times their size, and a peaked softmax amplifies that, by luck more in one version
    than in the other.
    """
    inputs = inputs_of(case) if inputs is None else inputs
    results = launched(case, tiles, inputs)
    exact, eager = formula(case, inputs, torch.float64), formula(case, inputs, case.dtype)
    natural = natural_scales(inputs, case.scale, case.maps * case.partition.groups)
    uncertain = torch.finfo(torch.float32).eps * float(exact["lse"].abs().max())
    for name, result in results.items():
        allowed = allowed_error(name, exact[name], eager[name], case.dtype, natural.get(name, 0.0), uncertain)
        error = float((result.double() - exact[name]).abs().max())
        assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"
