"""The problems of a certificate: those that `tiles verify` compiles, made small where kernels are interpreted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.cases import has_tf32
from bench.certify.rows import Setting
from bench.tiles.compile import DTYPES, Problem
from bench.tiles.verify import FP16, SHAPES, problems_of
from isa_triton import Partition, partitioned_attention

INTERPRETED = ("float16", "float32")  # dtypes: Triton's interpreter gets bf16 wrong, and knows no tf32
TIMED = "bfloat16"


def dtypes(setting: Setting, shape: str) -> list[str]:
    """In which a shape is checked: fp16 has bf16's tiles, so that a few shapes suffice, as for `tiles verify`."""
    if setting.interpreted:
        return [INTERPRETED[0] if shape in FP16 else INTERPRETED[1]]
    return [each.dtype for each in problems_of(has_tf32(setting.device), [SHAPES[shape]])]


def problem(setting: Setting, shape: str, dtype: str, maps: int = 2) -> Problem:
    """A shape in a dtype, of so many maps; one where its scores are those of all pixels."""
    found = replace(SHAPES[shape], dtype=dtype, maps=maps)
    return tiny(found) if setting.interpreted else found


def tiny(whole: Problem) -> Problem:
    """The same kind of problem, for the interpreter: one map of a few pixels, ragged where the whole one is.

    Dense attention keeps more tokens than one block has, so that backward goes in passes.
    """
    partition = whole.partition
    if partition.groups == 1:
        partition = Partition.dense((7, 11))
    elif len(partition) == 3:
        partition = Partition.local((2, 4, 6) if partition.divides else (3, 5, 4), (2, 2, 3))
    elif partition.h.token_stride == 1:
        partition = Partition.local((4, 6) if partition.divides else (5, 7), (2, 3))
    else:
        partition = Partition.interlaced((4, 6), stride=(2, 3))
    widths = min(whole.key_width, 40), min(whole.value_width, 48)
    return replace(
        whole, partition=partition, key_width=widths[0], value_width=widths[1], heads=min(whole.heads, 2), maps=1
    )


def distinct(shapes: Iterable[str]) -> tuple[str, ...]:
    """Of shapes that are the same problem to the interpreter the first."""
    found: dict[object, str] = {}
    for shape in shapes:
        known = replace(tiny(SHAPES[shape]), name="")
        found.setdefault((known, shape in FP16), shape)
    return tuple(found.values())


@dataclass(frozen=True)
class Tensors:
    """What a problem is given: q, k [maps, H, W, heads, K], v, do [..., V], bias [heads, tokens, tokens] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    do: Tensor

    @classmethod
    def of(cls, problem: Problem, device: str, seed: int = 0, grad: bool = True) -> Tensors:
        """Normal entries, the same for the same seed."""
        generator = torch.Generator(device).manual_seed(seed)
        pixels, tokens = (problem.maps, *problem.partition.size, problem.heads), problem.partition.tokens

        def normal(*shape: int, grad: bool = grad) -> Tensor:
            made = torch.randn(shape, generator=generator, device=device, dtype=DTYPES[problem.dtype])
            return made.requires_grad_(grad)

        q, k, v = (normal(*pixels, width) for width in (problem.key_width, problem.key_width, problem.value_width))
        bias = normal(problem.heads, tokens, tokens) if problem.bias else None
        return cls(q, k, v, bias, normal(*pixels, problem.value_width, grad=False))

    @property
    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        return [x for x in (self.q, self.k, self.v, self.bias) if x is not None]

    def like(self, other: Tensors) -> None:
        """Take over what the other's tensors hold."""
        with torch.no_grad():
            for mine, theirs in zip((*self.leaves, self.do), (*other.leaves, other.do), strict=True):
                mine.copy_(theirs)


def attend(problem: Problem, tensors: Tensors) -> Tensor:
    """What is certified."""
    q, k, v, bias = tensors.q, tensors.k, tensors.v, tensors.bias
    return partitioned_attention(q, k, v, problem.partition, bias=bias, backend="triton")


def learn(problem: Problem, tensors: Tensors) -> tuple[Tensor, ...]:
    """The output, and the gradients of all that has one."""
    out = attend(problem, tensors)
    return out.detach(), *torch.autograd.grad(out, tensors.leaves, tensors.do)
