"""``python -m bench check``: the Triton kernels against the formula in fp64, and on a GPU how long they take.

On the CPU the kernels are interpreted, on small maps and without bf16, which Triton's interpreter gets wrong.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import measure
from bench.budget import allowed_error
from bench.commands.scaling import device
from isa_triton import Partition, fused, partitioned_attention, partitioned_attention_with_lse
from reference.attention import long_range_groups, short_range_groups

HELP = "the kernels against fp64, forward and backward: check.csv, with times on a GPU"
NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")
COLUMNS = ("case", "dtype", *NAMES, "forward_ms", "backward_ms")
Pair = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """One attention: `p` is the interval, the grid or the window of its kind."""

    kind: str
    size: Pair
    p: Pair
    widths: Pair  # of keys and values
    heads: int = 1
    bias: bool = False
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        (H, W), (P_h, P_w), (K, V) = self.size, self.p, self.widths
        p = f" {P_h}x{P_w}" if self.kind in ("interlaced", "grid", "local") else ""
        return f"{self.kind}{p} of {H}x{W}, {self.heads} heads {K}/{V}{', bias' * self.bias}"

    @property
    def partition(self) -> Partition:
        if self.kind == "interlaced":
            return Partition.interlaced(self.size, stride=self.p)
        if self.kind == "grid":
            return Partition.interlaced(self.size, grid=self.p)
        if self.kind == "local":
            return Partition.local(self.size, self.p)
        return getattr(Partition, self.kind)(self.size)  # rows, columns, dense

    def groups(self) -> Iterator[tuple[slice, slice]]:
        """The pixels of every group, said without the library."""
        (H, W), p = self.size, self.p
        if self.kind == "interlaced":
            return long_range_groups(H, W, p)
        if self.kind == "grid":
            return long_range_groups(H, W, (-(-H // p[0]), -(-W // p[1])))
        return short_range_groups(H, W, {"rows": (1, W), "columns": (H, 1), "dense": (H, W)}.get(self.kind, p))

    def inputs(self, device: str) -> dict[str, Tensor]:
        """q, k, v, bias if there is one, and the gradients do and dlse that arrive."""
        generator = torch.Generator(device).manual_seed(0)
        here, (K, V), tokens = (2, *self.size, self.heads), self.widths, self.partition.tokens
        shapes = {"q": (*here, K), "k": (*here, K), "v": (*here, V), "do": (*here, V), "dlse": here}
        if self.bias:
            shapes["bias"] = (self.heads, tokens, tokens)
        made = {name: torch.randn(shape, generator=generator, device=device) for name, shape in shapes.items()}
        return {name: x if name == "dlse" else x.to(self.dtype) for name, x in made.items()}


def cases(large: bool) -> list[Case]:
    """Every kind of partition, dividing and not, with every feature at least once."""
    half = [torch.float16, torch.bfloat16] if large else [torch.float16]
    even, odd = ((128, 256), (97, 130)) if large else ((8, 12), (9, 11))
    p = (8, 8) if large else (4, 3)
    kinds = ("interlaced", "grid", "local", "rows", "columns")
    found = [
        Case(kind, size, p, (64, 64), heads=2, bias=kind in ("grid", "local"), dtype=dtype)
        for kind in kinds
        for size in (even, odd)
        for dtype in (torch.float32, *half)
    ]
    whole = (48, 72) if large else (7, 13)
    found += [Case("dense", whole, whole, (32, 80), 3, dtype=dtype) for dtype in (torch.float32, *half)]
    found += [Case("local", odd, p, widths, bias=True, dtype=half[0]) for widths in ((39, 39), (24, 1), (1, 24))]
    found += [Case(kind, even, p, (256, 512), dtype=dtype) for kind in kinds[::2] for dtype in (torch.float32, *half)]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", type=device, default="cpu", help="cpu interprets the kernels (default: cpu)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="folder of check.csv (default: out)")


def run(args: argparse.Namespace) -> None:
    gpu = torch.device(args.device).type in fused.DEVICES
    if not gpu and os.environ.get("TRITON_INTERPRET") != "1":  # read when kernels are decorated: begin again with it
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "TRITON_INTERPRET": "1"})
    console = Console(width=max(Console().width, 150))
    wrong = check(cases(large=gpu), args.device, args.out / "check.csv", console)
    if wrong:
        sys.exit(1)


def check(cases: Sequence[Case], device: str, path: Path, console: Console) -> int:
    """Check and, on a GPU, time each case; print a table, write the CSV, and say how many cases are wrong."""
    gpu = torch.device(device).type in fused.DEVICES
    table = Table(title=f"errors as parts of what is allowed, {device}", title_justify="left")
    for column in COLUMNS[: None if gpu else -2]:
        table.add_column(column, justify="left" if column in ("case", "dtype") else "right", no_wrap=True)
    text, wrong = io.StringIO(), 0
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for case in cases:
        parts = errors(case, device)
        bad = not all(part <= 1 for part in parts.values())  # NaN is not
        wrong += bad
        times = [f"{1e3 * t:.4f}" for t in seconds(case, device)] if gpu else []
        cells = [f"{parts[name]:.2f}" if name in parts else "" for name in NAMES]
        row = [str(case), str(case.dtype).removeprefix("torch."), *cells, *times]
        table.add_row(*row, style="red" if bad else None)
        writer.writerow(row + [""] * (len(COLUMNS) - len(row)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.getvalue())
    console.print(table)
    console.print(f"{len(cases)} cases, {wrong} beyond the error budget. Wrote {path}", highlight=False)
    return wrong


def errors(case: Case, device: str) -> dict[str, float]:
    """The error of each output and gradient, as a part of what the budget allows."""
    inputs = case.inputs(device)
    out, lse, *gradients = _derivatives(inputs, case, "triton")
    got = dict(zip(NAMES, (out, lse, *gradients), strict=False))
    exact = dict(zip(NAMES, _derivatives({n: x.double() for n, x in inputs.items()}, case, "formula"), strict=False))
    eager = dict(zip(NAMES, _derivatives(inputs, case, "formula"), strict=False))
    natural, recomputed = _natural(inputs, case), torch.finfo(torch.float32).eps * float(exact["lse"].abs().max())
    parts = {}
    for name, result in got.items():
        again = recomputed if name.startswith("d") else 0.0
        allowed = allowed_error(name, exact[name], eager[name], case.dtype, natural.get(name, 0.0), again)
        parts[name] = float((result.double() - exact[name]).abs().max()) / allowed
    return parts


def seconds(case: Case, device: str) -> tuple[float, float]:
    """Median seconds of forward and of backward alone, by device events."""
    inputs = case.inputs(device)
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    bias = inputs["bias"].requires_grad_() if case.bias else None
    out = partitioned_attention(q, k, v, case.partition, bias=bias, backend="triton")
    leaves = [q, k, v, *([] if bias is None else [bias])]

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (partitioned_attention(q, k, v, case.partition, bias=bias, backend="triton"),)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, leaves, inputs["do"], retain_graph=True)

    medians = measure.seconds({"forward": forward, "backward": backward}, rounds=50, device=device)
    return medians["forward"], medians["backward"]


def _derivatives(inputs: dict[str, Tensor], case: Case, who: str) -> tuple[Tensor, ...]:
    """out, lse and all gradients, by the kernels or by the formula in the inputs' precision."""
    leaves = {
        name: inputs[name].detach().clone().requires_grad_() for name in ("q", "k", "v", "bias") if name in inputs
    }
    q, k, v, bias = leaves["q"], leaves["k"], leaves["v"], leaves.get("bias")
    if who == "triton":
        out, lse = partitioned_attention_with_lse(q, k, v, case.partition, bias=bias, backend="triton")
    else:
        out, lse = _formula(q, k, v, bias, case)
    upstream = inputs["do"], inputs["dlse"].to(lse.dtype)
    return out.detach(), lse.detach(), *torch.autograd.grad((out, lse), list(leaves.values()), upstream)


def _formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, case: Case) -> tuple[Tensor, Tensor]:
    """out and lse, group by group."""
    out, lse, columns = torch.zeros_like(v), torch.zeros_like(q[..., 0]), case.partition.w.tokens
    for pixels in case.groups():
        here = (slice(None), *pixels)
        h, w = q[here].shape[1:3]
        qs, ks, vs = (x[here].flatten(1, 2).transpose(1, 2) for x in (q, k, v))  # [B, heads, T, width]
        scores = qs @ ks.mT * case.widths[0] ** -0.5
        if bias is not None:
            tokens = (torch.arange(h)[:, None] * columns + torch.arange(w)).flatten()
            scores = scores + bias[:, tokens][:, :, tokens]
        out[here] = (scores.softmax(-1) @ vs).transpose(1, 2).unflatten(1, (h, w))
        lse[here] = scores.logsumexp(-1).transpose(1, 2).unflatten(1, (h, w))
    return out, lse


def _natural(inputs: dict[str, Tensor], case: Case) -> dict[str, float]:
    """How large the terms are whose sums dq, dk and dbias are."""
    q, k, v, do, dlse = (inputs[name].double() for name in ("q", "k", "v", "do", "dlse"))
    ds = float(do.norm(dim=-1).max() * v.norm(dim=-1).max() + dlse.abs().max())
    scale, groups = case.widths[0] ** -0.5, 2 * case.partition.groups
    return {"dq": scale * ds * float(k.abs().max()), "dk": scale * ds * float(q.abs().max()), "dbias": ds * groups**0.5}
