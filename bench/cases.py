"""What is checked: attentions over any partition, layout and width, and how far a backend is from the formula in fp64.

A few named cases cover every feature once; `strategy` describes the space that hypothesis draws from, and shrinks in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from isa_triton import Partition, PartitionBatch, dropout_mask, partitioned_attention_with_lse
from reference.attention import Group, attention_of_groups, long_range_groups, short_range_groups
from reference.budget import allowed_error, natural_scales

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")
ALL_NAMES = (*NAMES, "dscale", "dextra_k", "dextra_v")
LEAVES = ("q", "k", "v", "bias", "scale", "extra_k", "extra_v")  # what has a gradient
OPTIONS = (*LEAVES[3:], "valid", "extra_weight", "seed")  # of `partitioned_attention`
WEIGHTS = ("", "keys", "pixels", "maps")
KINDS = ("interlaced", "grid", "local", "rows", "columns", "dense")
WIDTHS = ((16, 16), (24, 39), (64, 32), (64, 64))  # of what is drawn where each pair is compiled: few, not all even
LAYOUTS = ("contiguous", "nchw", "heads_first", "sliced", "transposed", "expanded", "scalar")
Pair = tuple[int, int]
Size = tuple[int, ...]  # of a map (H, W), or of a line (L,) or a volume (D, H, W)


@dataclass(frozen=True)
class Case:
    """One attention: `p` is the interval, the grid or the window of its kind; `logits` how large its scores are.

    `shift` moves the windows of kind "local", which go on beyond the seams of `cyclic` axes.
    """

    kind: str
    size: Size
    p: Size
    widths: Pair  # of keys and values
    heads: int = 1
    bias: bool = False
    dtype: torch.dtype = torch.float32
    maps: int = 2
    layout: str = "contiguous"  # of q, k, v and of the gradient that arrives
    logits: float = 1.0
    seed: int = 0
    shift: Size = ()  # nowhere
    cyclic: tuple[bool, ...] = ()  # none
    tf32: bool = False  # how products of fp32 are multiplied, where a device can
    share: int = 1  # how many of the heads of queries have one of keys and values
    per_map: bool = False  # each map has a bias of its own
    one_head: bool = False  # the bias has, which serves all
    forbids: bool = False  # the bias is minus infinity for some keys, and for all of some queries
    table_dtype: torch.dtype | None = None  # of the bias and the scales, where it is not that of q
    scales: bool = False  # each head has its own
    cosine: bool = False  # scores are of vectors of length 1
    valid: bool = False  # some pixels are not
    extra: int = 0  # keys for all pixels
    dropout: float = 0.0  # the part of the weights that is dropped
    weights: str = ""  # of extra keys, one of `WEIGHTS`: none, for all, for every pixel, for every pixel of every map
    packed: tuple[Size, ...] = ()  # sizes of maps one after another on a line of `size`, whose end may be nobody's
    on_device: bool = False  # the host is not told the sizes of packed maps

    def __str__(self) -> str:
        K, V = self.widths
        p = f" {'x'.join(map(str, self.p))}" if self.kind in ("interlaced", "grid", "local") else ""
        p += f" moved by {'x'.join(map(str, self.shift))}" if any(self.shift) else ""
        p += f", axes {', '.join(str(i) for i, is_so in enumerate(self.cyclic) if is_so)} cyclic," * any(self.cyclic)
        maps = "x".join(map(str, (self.maps, *self.size)))
        if self.packed:
            maps = f"{' '.join('x'.join(map(str, size)) for size in self.packed)} packed in {maps}"
            maps += ", sizes on the device" * self.on_device
        return f"{self.kind}{p} of {maps}, {self.heads} heads {K}/{V}{self._options}, {self.layout}"

    @property
    def _options(self) -> str:
        """What it has beside q, k and v, in words."""
        bias = "bias" + " a map" * self.per_map + " of one head" * self.one_head + " with -inf" * self.forbids
        weighted = f" weighted for {self.weights}" if self.weights else ""
        tables = str(self.table_dtype).removeprefix("torch.")
        said = {
            f"{self.share} a key": self.share > 1, bias: self.bias, "scales": self.scales,
            f"tables of {tables}": self.table_dtype is not None and (self.bias or self.scales), "valid": self.valid,
            "cosines": self.cosine,
            f"{self.extra} extra keys{weighted}": self.extra > 0, f"{self.dropout:.0%} dropped": self.dropout > 0,
        }  # fmt: skip
        return "".join(f", {words}" for words, is_so in said.items() if is_so)

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
        """Of a map; of packed maps, that of their groups' tokens."""
        if self.packed:
            return self.batch("cpu").line
        if self.kind == "interlaced":
            return Partition.interlaced(self.size, stride=self.p)
        if self.kind == "grid":
            return Partition.interlaced(self.size, grid=self.p)
        if self.kind == "local":
            return Partition.local(self.size, self.p, self.shift or None, cyclic=self.cyclic or False)
        return getattr(Partition, self.kind)(self.size)  # rows, columns, dense

    def batch(self, device: torch.device | str) -> PartitionBatch:
        """The partitions of packed maps; of sizes on the device, a map that is none among them and a group to spare."""
        make, p = (PartitionBatch.local, "window") if self.kind == "local" else (PartitionBatch.interlaced, "grid")
        options: dict[str, Any] = {p: self.p, "pixels": self.size[0], "device": device}
        if self.shift:
            options["shift"] = self.shift
        if not self.on_device:
            return make(self.packed, **options)
        groups = sum(1 for map_ in self.maps_alone() for _ in map_.groups())
        first, *rest = self.packed
        sizes = torch.tensor([first, (0,) * len(first), *rest], device=device)
        return make(sizes, groups=groups + 1, **options)

    def maps_alone(self) -> Iterator[Case]:
        """Of each packed map, the case of it alone, which may be smaller than its window or grid."""
        return (replace(self, size=size, packed=()) for size in self.packed)

    @property
    def scale(self) -> float:
        """Makes the scores of standard normal q and k about `logits` large, and those of cosines at most."""
        return self.logits if self.cosine else self.logits * self.widths[0] ** -0.5

    def attended(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """out and lse by the formula, and by groups of pixels that are said without the library."""
        if self.packed:
            return self._attended_one_by_one(inputs)
        if "seed" in inputs and "factors" not in inputs:
            drawn: dict[str, Any] = {
                "maps": self.maps,
                "heads": self.heads,
                "dropout_p": self.dropout,
                "extra_keys": self.extra,
            }
            kept = dropout_mask(self.partition, seed=inputs["seed"], **drawn)  # [B, H, W, heads, tokens + n]
            inputs = inputs | {"factors": kept.to(inputs["q"].dtype) / (1 - self.dropout)}
        shift = self.shift or (0,) * len(self.size)
        wraps = [i for i, is_so in enumerate(self.cyclic) if is_so and shift[i]]
        if wraps:  # windows begin where the second of the shifted ones does, and none is cut
            by, axes = [self.p[i] - shift[i] for i in wraps], [1 + i for i in wraps]
            rest = tuple(0 if i in wraps else of_axis for i, of_axis in enumerate(shift))
            on_map = {"q", "k", "v", "valid", "factors", *["extra_weight"] * (self.weights in ("pixels", "maps"))}
            rolled = {name: x.roll(by, axes) if name in on_map else x for name, x in inputs.items()}
            results = replace(self, shift=rest, cyclic=()).attended(rolled)
            out, lse = (x.roll([-n for n in by], axes) for x in results)
            return out, lse
        whole = self.p if self.kind in ("local", "grid") else tuple(axis.tokens for axis in self.partition)
        q, k, v, bias, scale = (*(inputs[name] for name in "qkv"), inputs.get("bias"), inputs.get("scale", self.scale))
        more = {name: inputs.get(name) for name in ("valid", "extra_k", "extra_v", "extra_weight", "factors")}
        if self.cosine:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            more["extra_k"] = None if more["extra_k"] is None else F.normalize(more["extra_k"], dim=-1)
        return attention_of_groups(q, k, v, bias, scale, self.groups(), whole, shift, **more)

    def _attended_one_by_one(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Of packed maps; 0 and minus infinity of pixels behind the last."""
        on_map, start = ("q", "k", "v", "valid"), 0
        out = inputs["v"].new_zeros(*inputs["q"].shape[:-1], self.widths[1])
        lse = torch.full_like(out[..., 0], -torch.inf)
        for alone in self.maps_alone():
            here = slice(start, start := start + math.prod(alone.size))
            given = {n: x[here].unflatten(0, alone.size)[None] if n in on_map else x for n, x in inputs.items()}
            out[here], lse[here] = (x.flatten(0, len(alone.size)) for x in alone.attended(given))
        return out, lse

    def arguments(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        """What `partitioned_attention` is called with for inputs."""
        given = {name: inputs[name] for name in ("q", "k", "v", *OPTIONS) if name in inputs}
        numbers = {"scale": self.scale, "dropout_p": self.dropout, "cosine": self.cosine}
        partition = self.batch(inputs["q"].device) if self.packed else self.partition
        return {"partition": partition} | numbers | given

    def groups(self) -> Iterator[Group]:
        """The pixels of every group, windows cut on the edges, said without the library."""
        size, p, one = self.size, self.p, (1,) * (len(self.size) - 1)
        if self.kind == "interlaced":
            return long_range_groups(size, p)
        if self.kind == "grid":
            return long_range_groups(size, [-(-n // g) for n, g in zip(size, p, strict=True)])
        p = {"rows": (*one, size[-1]), "columns": (*one[1:], *size[-2:-1], 1), "dense": size}.get(self.kind, p)
        return short_range_groups(size, p, self.shift or None)

    def inputs(self, device: str = "cpu") -> dict[str, Tensor]:
        """q, k, v, those of `OPTIONS` that there are, and the gradients do and dlse that arrive.

        Those of packed maps have no axis of maps.
        """
        generator = torch.Generator(device).manual_seed(self.seed)

        def normal(*sizes: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(sizes, generator=generator, device=device).to(dtype)

        def some(*sizes: int, part: float) -> Tensor:
            return torch.rand(sizes, generator=generator, device=device) < part

        here, (K, V), tokens = (self.maps, *self.size, self.heads), self.widths, self.partition.tokens
        keys, table = (*here[:-1], self.heads // self.share), self.table_dtype or self.dtype
        shapes = {"q": (*here, K), "k": (*keys, K), "v": (*keys, V), "do": (*here, V)}
        made = {name: laid_out(self.layout, shape, normal) for name, shape in shapes.items()}
        if self.bias:  # transposed in memory, as a table's permutation is
            of_map, heads = (self.maps,) * self.per_map, 1 if self.one_head else self.heads
            made["bias"] = normal(*of_map, tokens, tokens, heads, dtype=table).movedim(-1, -3)
        made["dlse"] = laid_out(self.layout, (*here, 1), partial(normal, dtype=torch.float32))[..., 0]
        if self.bias and self.forbids:
            bias = made["bias"].masked_fill(some(*made["bias"].shape, part=0.3), -torch.inf)
            made["bias"] = bias.masked_fill(some(*bias.shape[:-1], 1, part=0.1), -torch.inf)
        if self.scales:  # of heads that differ, every second number in memory
            made["scale"] = (self.scale * (1 + normal(2 * self.heads, dtype=table) / 4))[::2]
        if self.valid:
            made["valid"] = laid_out(self.layout, (*here[:-1], 1, 1), partial(some, part=0.6))[..., 0, 0]
        if self.extra:
            widths = {"extra_k": K, "extra_v": V}
            shapes = {name: (self.maps, self.extra, self.heads, width) for name, width in widths.items()}
            made |= {name: laid_out(self.layout, shape, normal) for name, shape in shapes.items()}
        if self.extra and self.weights:
            maps = {"keys": (), "pixels": (1, *self.size), "maps": (self.maps, *self.size)}[self.weights]
            copies = torch.tensor([0.0, 0.5, 1.0, 3.0], device=device)
            drawn = torch.randint(4, (*maps, self.extra), generator=generator, device=device)
            made["extra_weight"] = copies[drawn]
        if self.dropout:
            made["seed"] = torch.tensor((self.seed << 20) + 1, device=device)  # more than 32 bits
        if self.packed:
            made |= {name: made[name][0] for name in ("q", "k", "v", "do", "dlse", "valid") if name in made}
        return made


def laid_out(layout: str, shape: tuple[int, ...], make: Callable[..., Tensor]) -> Tensor:
    """A [B, H, W, heads, width] tensor that lies in memory as `layout` says, of what `make` makes of sizes."""
    b, *size, heads, width = shape
    axes = range(1, 1 + len(size))
    match layout:
        case "nchw":
            return make(b, heads, width, *size).movedim((1, 2), (-2, -1))
        case "heads_first":
            return make(b, heads, *size, width).movedim(1, -2)
        case "sliced":  # a piece of a wider tensor on a larger map, somewhere in its storage
            larger = make(b, size[0] + 3, *(n + 2 for n in size[1:]), heads, 2 * width + 3)
            inner: tuple[Any, ...] = (slice(1, -2), *[slice(1, -1)] * len(size[1:]))
            return larger[(slice(None), *inner, slice(None), slice(3, width + 3))]
        case "transposed":  # columns before rows
            return make(b, *reversed(size), heads, width).permute(0, *reversed(axes), -2, -1)
        case "expanded":  # stride 0 along maps, rows and heads
            return make(1, *[1] * len(size[1:]), size[-1], 1, width).expand(shape)
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

    sides = {1: st.integers(1, 4 * longest), 2: st.integers(1, longest), 3: st.integers(1, 1 + longest // 2)}
    tiny, rarely = st.integers(1, 3), st.sampled_from((False, False, True))  # so that few come at once
    shares, extras = st.sampled_from((1, 1, 2, 3)), st.sampled_from((0, 0, 1, 3))
    width = st.one_of(st.integers(1, widest), st.sampled_from((16, 24, 32, 39, 64)))
    widths = st.sampled_from(WIDTHS) if compiled else st.tuples(width, width)

    @st.composite
    def draw_case(draw: Any) -> Case:
        axes = draw(st.sampled_from((2, 1, 3)))  # the first is the simplest
        size = draw(st.tuples(*[sides[axes]] * axes))
        p = tuple(draw(st.integers(1, side)) for side in size)
        kind = draw(st.sampled_from([kind for kind in KINDS if axes > 1 or kind not in ("rows", "columns")]))
        moves = kind == "local" and draw(st.booleans())
        bias, (share, extra) = draw(st.booleans()), draw(st.tuples(shares, extras))
        packs = kind in ("local", "grid") and draw(st.booleans())
        packed = (size, *draw(st.lists(st.tuples(*[sides[axes]] * axes), max_size=3))) if packs else ()
        if packs:  # which takes no more than these
            size, extra = (sum(map(math.prod, packed)) + draw(st.integers(0, 3)),), 0
        return Case(
            kind=kind,
            size=size,
            p=p,
            widths=draw(widths),
            heads=share * draw(tiny),
            bias=bias,
            dtype=(dtype := draw(st.sampled_from(dtypes))),
            maps=1 if packs else draw(st.sampled_from((1, 2, 1, 2, 0))),
            layout=draw(st.sampled_from(LAYOUTS)),
            logits=draw(st.sampled_from((1.0, 0.0, -2.0, 30.0, 1e3, 1e4))),
            seed=draw(st.integers(0, 2**31)),
            shift=tuple(draw(st.integers(0, side - 1)) for side in p) if moves else (),
            cyclic=tuple(draw(st.booleans()) for _ in p) if moves and not packs else (),
            tf32=tf32 and dtype == torch.float32 and draw(st.booleans()),
            share=share,
            per_map=bias and not packs and draw(rarely),
            one_head=bias and draw(rarely),
            forbids=bias and draw(rarely),
            table_dtype=draw(st.sampled_from((None, None, *dtypes, torch.float64))),
            scales=draw(rarely),
            cosine=draw(rarely),
            valid=draw(rarely),
            extra=extra,
            dropout=0.0 if packs else draw(st.sampled_from((0.0, 0.0, 0.0, 0.1, 0.5))),
            weights=draw(st.sampled_from(WEIGHTS)) if extra else "",
            packed=packed,
            on_device=packs and draw(st.booleans()),
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
        inputs = inputs | {"dlse": torch.zeros(inputs["q"].shape[:-1], device=inputs["q"].device)}
    with multiplied_as_tf32(case.tf32):
        eager = derivatives(inputs, case)
    exact = derivatives(converted(inputs, torch.float64), case)
    none = {name: result == -torch.inf for name, result in exact.items()}  # the lse of queries without keys
    if not all(result[~none[name]].isfinite().all() for name, result in eager.items()):
        eager = derivatives(converted(inputs, torch.float32), case)  # fp16 has overflowed where a backend need not
    scale = case.scale if "scale" not in inputs else float(inputs["scale"].abs().max())
    natural = natural_scales(inputs, scale, case.maps * case.partition.groups, case.cosine)
    of_scores = torch.finfo(case.rounded_to if case.tf32 else torch.float32)  # which are sums of products
    uncertain = of_scores.eps * float(exact["lse"].masked_fill(none["lse"], 0).abs().max())
    tables = max(case.rounded_to, case.table_dtype or case.rounded_to, key=lambda dtype: torch.finfo(dtype).eps)
    found = {}
    for name, result in got.items():
        of_all = name in ("dscale", "dextra_k", "dextra_v")  # which are sums over pixels
        equal = case.maps * math.prod(case.size) + sum(case.widths) if of_all else case.partition.tokens
        equal = equal if case.layout in ("expanded", "scalar") else 0
        terms = natural.get(name, 0.0), uncertain, equal
        dtype = tables if name in ("dbias", "dscale") else case.rounded_to
        true, plain = (x[name].masked_fill(none[name], 0) for x in (exact, eager))
        allowed = allowed_error(name, true, plain, dtype, *terms)
        limit = torch.finfo(result.dtype).max  # beyond it infinity is the rounded result
        error = float((result.double().clamp(-limit, limit) - exact[name].clamp(-limit, limit)).abs().max())
        found[name] = error / allowed if allowed else float(error > 0) * float("inf") if error else 0.0
    return found


def converted(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """In another precision, but for truth values."""
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


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
    leaves = {name: inputs[name].detach().requires_grad_() for name in LEAVES if name in inputs}
    given = {name: inputs[name] for name in OPTIONS if name in inputs} | leaves
    if backend is None:
        out, lse = case.attended(given)
    else:
        out, lse = partitioned_attention_with_lse(**case.arguments(given), backend=backend)
    upstream = inputs["do"], inputs["dlse"].to(lse.dtype)
    gradients = torch.autograd.grad((out, lse), list(leaves.values()), upstream)
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach()} | named
