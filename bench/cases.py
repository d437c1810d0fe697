"""What is checked: attentions over any partition, layout and width, and how far a backend is from the formula in fp64.

A few named cases cover every feature once; `strategy` describes the space that hypothesis draws from, and shrinks in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from isa_triton import Partition, partitioned_attention_with_lse
from reference.attention import attention_of_groups, long_range_groups, short_range_groups
from reference.budget import allowed_error, natural_scales

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")
KINDS = ("interlaced", "grid", "local", "rows", "columns", "dense")
WIDTHS = ((16, 16), (24, 39), (64, 32), (64, 64))  # of what is drawn where each pair is compiled: few, not all even
LAYOUTS = ("contiguous", "nchw", "heads_first", "sliced", "transposed", "expanded", "scalar")
Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One attention: `p` is the interval, the grid or the window of its kind; `logits` how large its scores are.

    `shift` moves the windows of kind "local".
    """

    kind: str
    size: Pair
    p: Pair
    widths: Pair  # of keys and values
    heads: int = 1
    bias: bool = False
    dtype: torch.dtype = torch.float32
    maps: int = 2
    layout: str = "contiguous"  # of q, k, v and of the gradient that arrives
    logits: float = 1.0
    seed: int = 0
    shift: Pair = (0, 0)
    tf32: bool = False  # how products of fp32 are multiplied, where a device can

    def __str__(self) -> str:
        (H, W), (P_h, P_w), (K, V) = self.size, self.p, self.widths
        p = f" {P_h}x{P_w}" if self.kind in ("interlaced", "grid", "local") else ""
        p += f" moved by {self.shift[0]}x{self.shift[1]}" if any(self.shift) else ""
        return f"{self.kind}{p} of {self.maps}x{H}x{W}, {self.heads} heads {K}/{V}{', bias' * self.bias}, {self.layout}"

    @property
    def arithmetic(self) -> str:
        """The dtype as `isa_triton.tiles` names it."""
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    @property
    def rounded_to(self) -> torch.dtype:
        """A dtype with the fraction of the numbers that are multiplied: tf32's is that of fp16."""
        return torch.float16 if self.tf32 else self.dtype

    @property
    def partition(self) -> Partition:
        if self.kind == "interlaced":
            return Partition.interlaced(self.size, stride=self.p)
        if self.kind == "grid":
            return Partition.interlaced(self.size, grid=self.p)
        if self.kind == "local":
            return Partition.local(self.size, self.p, self.shift)
        return getattr(Partition, self.kind)(self.size)  # rows, columns, dense

    @property
    def scale(self) -> float:
        """Makes the scores of standard normal q and k about `logits` large."""
        return self.logits * self.widths[0] ** -0.5

    def groups(self) -> Iterator[tuple[slice, slice]]:
        """The pixels of every group, said without the library."""
        (H, W), p = self.size, self.p
        if self.kind == "interlaced":
            return long_range_groups(H, W, p)
        if self.kind == "grid":
            return long_range_groups(H, W, (-(-H // p[0]), -(-W // p[1])))
        p = {"rows": (1, W), "columns": (H, 1), "dense": (H, W)}.get(self.kind, p)
        return short_range_groups(H, W, p, self.shift)

    def inputs(self, device: str = "cpu") -> dict[str, Tensor]:
        """q, k, v, bias if there is one, and the gradients do and dlse that arrive."""
        generator = torch.Generator(device).manual_seed(self.seed)

        def normal(*sizes: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device).to(dtype)

        here, (K, V), tokens = (self.maps, *self.size, self.heads), self.widths, self.partition.tokens
        shapes = {"q": (*here, K), "k": (*here, K), "v": (*here, V), "do": (*here, V)}
        made = {name: laid_out(self.layout, shape, normal) for name, shape in shapes.items()}
        if self.bias:  # transposed in memory, as a table's permutation is
            made["bias"] = normal(tokens, tokens, self.heads).permute(2, 0, 1)
        return made | {"dlse": laid_out(self.layout, (*here, 1), partial(normal, dtype=torch.float32))[..., 0]}


def laid_out(layout: str, shape: tuple[int, ...], make: Callable[..., Tensor]) -> Tensor:
    """A [B, H, W, heads, width] tensor that lies in memory as `layout` says, of what `make` makes of sizes."""
    b, h, w, heads, width = shape
    match layout:
        case "nchw":
            return make(b, heads, width, h, w).permute(0, 3, 4, 1, 2)
        case "heads_first":
            return make(b, heads, h, w, width).permute(0, 2, 3, 1, 4)
        case "sliced":  # a piece of a wider tensor on a larger map, somewhere in its storage
            return make(b, h + 3, w + 2, heads, 2 * width + 3)[:, 1:-2, 1:-1, :, 3 : width + 3]
        case "transposed":  # columns before rows
            return make(b, w, h, heads, width).transpose(1, 2)
        case "expanded":  # stride 0 along maps, rows and heads
            return make(1, 1, w, 1, width).expand(shape)
        case "scalar":
            return make(1).expand(shape)
        case "contiguous":
            return make(*shape)
    raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")


def strategy(
    dtypes: tuple[torch.dtype, ...], longest: int = 12, widest: int = 80, compiled: bool = False, tf32: bool = False
) -> Any:
    """hypothesis's strategy for cases on maps of up to `longest` pixels a side and heads of up to `widest` channels.

    Where kernels are `compiled` for them, cases have one of a few `WIDTHS`; fp32 is sometimes `tf32` where it may be.
    """
    from hypothesis import strategies as st  # only whoever draws cases needs it

    sides, tiny = st.integers(1, longest), st.integers(1, 3)
    width = st.one_of(st.integers(1, widest), st.sampled_from((16, 24, 32, 39, 64)))
    widths = st.sampled_from(WIDTHS) if compiled else st.tuples(width, width)

    @st.composite
    def draw_case(draw: Any) -> Case:
        size = draw(st.tuples(sides, sides))
        p = tuple(draw(st.integers(1, side)) for side in size)
        kind = draw(st.sampled_from(KINDS))
        shift = tuple(draw(st.integers(0, side - 1)) if kind == "local" else 0 for side in p)
        return Case(
            kind=kind,
            size=size,
            p=(p[0], p[1]),
            widths=draw(widths),
            heads=draw(tiny),
            bias=draw(st.booleans()),
            dtype=(dtype := draw(st.sampled_from(dtypes))),
            maps=draw(st.integers(0, 2)),
            layout=draw(st.sampled_from(LAYOUTS)),
            logits=draw(st.sampled_from((1.0, 0.0, -2.0, 30.0, 1e3, 1e4))),
            seed=draw(st.integers(0, 2**31)),
            shift=(shift[0], shift[1]),
            tf32=tf32 and dtype == torch.float32 and draw(st.booleans()),
        )

    return draw_case()


def errors(case: Case, backend: str, device: str = "cpu") -> dict[str, float]:
    """The error of each output and gradient, as a part of what the budget allows; nothing for an empty batch."""
    inputs = case.inputs(device)
    with multiplied_as_tf32(case.tf32):
        got = derivatives(inputs, case, backend)
    if not case.maps:
        assert all(result.numel() == 0 or not result.any() for result in got.values())
        return {}
    return parts(case, inputs, got)


def parts(case: Case, inputs: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
    """The error of each of some results, by name, as a part of what the budget allows.

    Args:
        inputs: as `Case.inputs` has them; without dlse, lse has no gradient.
    """
    if "dlse" not in inputs:
        inputs = inputs | {"dlse": torch.zeros(inputs["q"].shape[:4], device=inputs["q"].device)}
    with multiplied_as_tf32(case.tf32):
        eager = derivatives(inputs, case)
    exact = derivatives({name: x.double() for name, x in inputs.items()}, case)
    if not all(result.isfinite().all() for result in eager.values()):  # fp16 has overflowed where a backend need not
        eager = derivatives({name: x.float() for name, x in inputs.items()}, case)
    natural = natural_scales(inputs, case.scale, case.maps * case.partition.groups)
    of_scores = torch.finfo(case.rounded_to if case.tf32 else torch.float32)  # which are sums of products
    uncertain = of_scores.eps * float(exact["lse"].abs().max())
    equal = case.partition.tokens if case.layout in ("expanded", "scalar") else 0
    found = {}
    for name, result in got.items():
        terms = natural.get(name, 0.0), uncertain, equal
        allowed = allowed_error(name, exact[name], eager[name], case.rounded_to, *terms)
        limit = torch.finfo(result.dtype).max  # beyond it infinity is the rounded result
        error = float((result.double().clamp(-limit, limit) - exact[name].clamp(-limit, limit)).abs().max())
        found[name] = error / allowed if allowed else float(error > 0) * float("inf") if error else 0.0
    return found


def has_tf32(device: str | torch.device) -> bool:
    """Whether a device multiplies fp32 as tf32 where PyTorch is told so: NVIDIA's since Ampere."""
    if torch.device(device).type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def multiplied_as_tf32(tf32: bool) -> Iterator[None]:
    """On a GPU products of fp32 inside are those of tf32, or exact, whatever PyTorch was told before."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def derivatives(inputs: dict[str, Tensor], case: Case, backend: str | None = None) -> dict[str, Tensor]:
    """out, lse and all gradients, by name, by a backend or by the formula in the inputs' precision."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in ("q", "k", "v", "bias") if name in inputs}
    q, k, v, bias = leaves["q"], leaves["k"], leaves["v"], leaves.get("bias")
    if backend is None:
        whole = case.partition.h.tokens, case.partition.w.tokens
        out, lse = attention_of_groups(q, k, v, bias, case.scale, case.groups(), whole, case.shift)
    else:
        out, lse = partitioned_attention_with_lse(q, k, v, case.partition, bias=bias, scale=case.scale, backend=backend)
    upstream = inputs["do"], inputs["dlse"].to(lse.dtype)
    gradients = torch.autograd.grad((out, lse), list(leaves.values()), upstream)
    return dict(zip(NAMES, (out.detach(), lse.detach(), *gradients), strict=False))
