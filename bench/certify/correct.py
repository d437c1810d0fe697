"""Part b: every shipped problem in every dtype against the formula in fp64, on the device.

Outputs are filled with NaN before the kernels write them, so that what is not written is seen; and the same call again
has to have the same bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bench import cases
from bench.certify.problems import Tensors, dtypes, problem
from bench.certify.rows import Found, Name, Setting
from bench.check import case_of
from bench.tiles.compile import Problem
from isa_triton import partitioned_attention, partitioned_attention_with_lse

REPEATS = 20
INTERPRETED_REPEATS = 2


def items(setting: Setting) -> list[Name]:
    return [(shape, dtype) for shape in setting.shapes for dtype in dtypes(setting, shape)]


def run(setting: Setting, shape: str, dtype: str) -> Found:
    found = problem(setting, shape, dtype)
    if found.partition.groups == 1:  # the scores of all pixels in fp64 are 2 GiB for one map
        found = problem(setting, shape, dtype, maps=1)
    inputs, repeats = inputs_of(found, setting.device), INTERPRETED_REPEATS if setting.interpreted else REPEATS
    with cases.multiplied_as_tf32(dtype == "tf32"), poisoned():
        first = results(found, inputs)
        same = sum(equal_bits(first, results(found, inputs)) for _ in range(repeats - 1))
    parts = cases.parts(case_of(found), inputs, first)
    figures = {name: f"{part:.3f}" for name, part in parts.items()} | {"same bits": f"{1 + same} of {repeats}"}
    return Found.judged("; ".join(wrong(parts, first, 1 + same, repeats)), **figures)


def wrong(parts: dict[str, float], got: dict[str, Tensor], same: int, repeats: int) -> Iterator[str]:
    """What is wrong, in words."""
    for name, part in parts.items():
        if missing := int(got[name].isnan().sum()):
            yield f"{name} has {missing} NaN of {got[name].numel()}, as memory that was not written has"
        elif not part <= 1:
            yield f"{name} is wrong by {part:.3g} times what the error budget allows"
    if same < repeats:
        yield f"{repeats - same} of {repeats} calls have other bits"


def inputs_of(found: Problem, device: str) -> dict[str, Tensor]:
    """Tensors by name; in fp16, where binaries with a gradient of lse are looked at, with dlse."""
    tensors = Tensors.of(found, device, grad=False)
    made = {"q": tensors.q, "k": tensors.k, "v": tensors.v, "do": tensors.do}
    if tensors.bias is not None:
        made["bias"] = tensors.bias
    if found.dtype == "float16":
        made["dlse"] = torch.randn(tensors.q.shape[:-1], device=device)
    return made


def results(found: Problem, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """out, lse where it has a gradient, and all gradients, by the kernels."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("q", "k", "v", "bias") if name in inputs}
    q, k, v, bias = leaves["q"], leaves["k"], leaves["v"], leaves.get("bias")
    outputs: dict[str, Tensor] = {}
    if "dlse" in inputs:
        attended = partitioned_attention_with_lse(q, k, v, found.partition, bias=bias, backend="triton")
        outputs["out"], outputs["lse"] = attended
    else:
        outputs["out"] = partitioned_attention(q, k, v, found.partition, bias=bias, backend="triton")
    upstream = [inputs["do"], *([inputs["dlse"]] if "dlse" in inputs else [])]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), upstream)
    detached = {name: output.detach() for name, output in outputs.items()}
    return detached | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def equal_bits(first: dict[str, Tensor], again: dict[str, Tensor]) -> bool:
    """Whether the results are the same, NaN with NaN."""
    return all(torch.equal(bits(first[name]), bits(x)) for name, x in again.items())


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


@contextmanager
def poisoned() -> Iterator[None]:
    """Whatever memory is taken inside is filled with NaN first."""
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
