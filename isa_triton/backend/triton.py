"""The backend by the Triton kernels: allocate, choose tiles, launch on the tensors' device; of `contract`.

Where a group fits in one block, backward needs q, k, v and bias alone; longer groups want out and lse too. Triton and
the kernels are imported when the first is launched.
"""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import tiles
from .._tracing import constant_in_graphs, is_fake
from ..partition import Partition
from .contract import Call, Gradients, Inputs, empty_gradients, empty_outputs, unfinished_dtype
from .cosine import pulled_back

OPAQUE = True
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda
INTERPRETED_TARGET = "sm_80"  # whose tiles Triton's interpreter runs with
INSTALLED = find_spec("triton") is not None
NONE = (None,) * 4  # scales, valid, seed and table of calls that are made again
LOGGER = logging.getLogger("isa_triton")


def why_not(q: Tensor) -> str | None:
    """Why the kernels cannot take tensors like q, or None if they can; none is launched for tensors without memory."""
    if not INSTALLED:
        return "triton is not installed (pip install triton)"
    if q.dtype not in DTYPES:
        return f"the kernels take {', '.join(map(str, DTYPES))}, not {q.dtype}"
    kind = q.device.type
    if kind in DEVICES or kind == "meta" or (not torch.compiler.is_compiling() and is_fake(q)):
        return None
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the kernels run on {' and '.join(DEVICES)} devices, or interpreted (TRITON_INTERPRET=1), not on {q.device}"


def keeps_output(q: Tensor, v: Tensor, partition: Partition) -> bool:
    """Whether backward needs out and lse: a group does not fit in one block."""
    widths = int(q.shape[-1]), int(v.shape[-1])  # constants of every kernel, so a symbolic width becomes one here
    return partition.tokens > _longest_group(q.device, q.dtype, *widths)


def forward(inputs: Inputs, call: Call) -> tuple[Tensor, Tensor]:
    """out and lse, by one kernel."""
    from .kernels import launch, plan

    q, k, v, bias, scales, valid, seed, table = inputs = _readable(inputs)
    out, lse = empty_outputs(inputs, call.with_lse)
    if valid is not None or table is not None:  # of pixels that do not exist, kernels write nothing
        out.zero_()
        lse.fill_(-torch.inf)
    kept_lse, precision = lse if call.with_lse else None, precision_of(q.dtype, q.device)
    tile = _forward_tile(*_problem(q, v, bias, call.partition))
    bias = in_whole_rows(bias, plan.in_one_block(tile, call.partition))
    with _on(q.device):
        launch.forward(
            q, k, v, bias, out, kept_lse, call.scale, call.partition, tile, precision, call.dropout_p,
            scales=scales, valid=valid, seed=seed, table=table, cosine=call.cosine,
        )  # fmt: skip
    return out, lse


def backward(
    inputs: Inputs, out: Tensor | None, lse: Tensor | None, do: Tensor, dlse: Tensor | None, call: Call
) -> Gradients:
    """The gradients, by one kernel or in passes; out and lse are needed where `keeps_output` says so."""
    from .kernels import launch, plan

    q, k, v, bias, scales, valid, seed, table = inputs = _readable(inputs)
    do, dlse, key_heads = _in_memory(do), _in_memory(dlse), k.shape[-2]
    dq, dk, dv, dbias, dscales = empty_gradients(inputs)
    wide = unfinished_dtype(q.dtype)
    if call.cosine:  # of vectors of length 1, and then divided
        dq, dk = dq.to(wide), dk.to(wide)
    if inputs.share > 1:  # of every head of q, and then added
        dk, dv = (x.new_empty(*q.shape[:-1], x.shape[-1], dtype=wide) for x in (dk, dv))
    if hidden := valid is not None or table is not None:
        for gradient in (dq, dk, dv):
            gradient.zero_()
    chosen = _backward_tiles(*_problem(q, v, bias, call.partition))
    delta, precision = None if lse is None else torch.empty_like(lse), precision_of(q.dtype, q.device)
    partials = None
    if bias is not None:
        shape = plan.bias_partials_shape(q.shape[0], q.shape[-2], call.partition, chosen, bias.dim() == 4)
        partials = q.new_empty(shape, dtype=torch.float32)
        bias = in_whole_rows(bias)
    with _on(q.device):
        launch.backward(
            q, k, v, bias, out, lse, do, dlse, dq, dk, dv, delta, partials, call.scale, call.partition, chosen,
            precision, call.dropout_p, scales=scales, valid=valid, seed=seed, table=table, cosine=call.cosine,
        )  # fmt: skip
    if partials is not None:
        dbias.copy_(partials.sum(0).view(dbias.shape))
    if inputs.share > 1:
        dk, dv = (x.unflatten(-2, (key_heads, -1)).sum(-2) for x in (dk, dv))
    if hidden and (call.cosine or scales is not None):  # whatever q and k hold where none arrives
        q, k = (x.masked_fill(~gradient.any(-1, keepdim=True), 0) for x, gradient in ((q, dq), (k, dk)))
    products = None
    if call.cosine:
        (dq, products), (dk, _) = pulled_back(q, dq), pulled_back(k, dk)
    if scales is not None:  # dq is without them
        products = q.float() * dq.float() if products is None else products
        dscales.copy_(products.sum(tuple({*range(q.dim())} - {q.dim() - 2})))
        dq *= scales[:, None].to(dq.dtype)
    return Gradients(dq, dk.to(k.dtype), dv.to(v.dtype), dbias, dscales)


class Replay:
    """`forward` made again, for tensors that differ from these in what they hold only: nothing is chosen again.

    Of calls with as many heads of k and v as of q, without scales, cosines or dropout and with all pixels valid.

    Attributes:
        backward: `BackwardReplay`s of its results, by what tells them apart; the caller's.
    """

    def __init__(self, call: Call, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> None:
        from .kernels import launch, plan

        self.call, self.backward = call, dict[Any, BackwardReplay]()
        out, lse = empty_outputs(Inputs(q, k, v), call.with_lse)
        tile, precision = _forward_tile(*_problem(q, v, bias, call.partition)), precision_of(q.dtype, q.device)
        with _on(q.device):
            self.keeps_bias = plan.in_one_block(tile, call.partition)
            bias = in_whole_rows(bias, self.keeps_bias)
            tensors = q, k, v, bias, *NONE, out, lse if call.with_lse else None
            self.launch = launch.Replay(plan.forward, tensors, call.scale, call.partition, tile, precision)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """out and lse, if the call is with lse."""
        out = torch.empty_like(v, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32) if self.call.with_lse else None
        self.launch((q, k, v, in_whole_rows(bias, self.keeps_bias), *NONE, out, lse))
        return out, lse


class BackwardReplay:
    """`backward` made again, without dlse, as `Replay` does `forward`."""

    def __init__(
        self,
        call: Call,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        out: Tensor | None,
        lse: Tensor | None,
        do: Tensor,
    ) -> None:
        from .kernels import launch, plan

        chosen, precision = _backward_tiles(*_problem(q, v, bias, call.partition)), precision_of(q.dtype, q.device)
        per_map = bias is not None and bias.dim() == 4
        self.partials = plan.bias_partials_shape(q.shape[0], q.shape[-2], call.partition, chosen, per_map)
        with _on(q.device):
            tensors = q, k, v, in_whole_rows(bias), *NONE, out, lse, do, None, *self._empty(q, k, v, bias, lse)
            self.launch = launch.Replay(plan.backward, tensors, call.scale, call.partition, chosen, precision)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Any, lse: Any, do: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """dq, dk, dv and dbias."""
        dq, dk, dv, delta, partials = self._empty(q, k, v, bias, lse)
        self.launch((q, k, v, in_whole_rows(bias), *NONE, out, lse, do, None, dq, dk, dv, delta, partials))
        return dq, dk, dv, None if bias is None else partials.sum(0).to(bias.dtype).view(bias.shape)

    def _empty(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, lse: Tensor | None) -> tuple[Any, ...]:
        dq, dk, dv = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        delta = None if lse is None else torch.empty_like(lse)
        return dq, dk, dv, delta, None if bias is None else q.new_empty(self.partials, dtype=torch.float32)


def can_replay(q: Tensor, *others: Tensor | None) -> bool:
    """Whether a call launched something, on a device, for tensors as they lie in memory."""
    from .kernels import launch

    as_they_lie = not any(x is not None and x.is_neg() for x in (q, *others))
    return not launch.INTERPRETED and q.device.type in DEVICES and q.numel() > 0 and as_they_lie


def _readable(inputs: Inputs) -> Inputs:
    """As kernels will read them: PyTorch negates lazily, by a bit beside the memory, and truth values are bytes."""
    q, k, v, bias, scales = map(_in_memory, inputs[:5])
    scales, seed, table = (None if x is None else x.contiguous() for x in (scales, inputs.seed, inputs.table))
    valid = inputs.valid
    if valid is not None:
        valid = valid.view(torch.uint8)[..., None].expand(q.shape[:-1])
    return Inputs(q, k, v, bias, scales, valid, seed, table)


def _in_memory(x: Any) -> Any:
    """A tensor or None as kernels will read it: PyTorch negates lazily, by a bit beside the memory (`is_neg`)."""
    return x.resolve_neg() if x is not None and x.is_neg() else x


def in_whole_rows(bias: Tensor | None, kept: bool = False) -> Tensor | None:
    """A bias as kernels will read it: unless it is kept on chip, its rows begin at multiples of 16 bytes.

    Of 49 or 343 tokens they would not, and would be loaded number by number, each by a pointer of its own. A copy is a
    pass over a bias, of which every group then reads all.
    """
    from .kernels import plan

    if bias is None or kept:
        return bias
    tokens = bias.shape[-1]
    more = plan.whole_rows(tokens, bias.itemsize) - tokens
    if not more:
        return bias
    of_heads = bias.narrow(-3, 0, 1) if bias.stride(-3) == 0 and bias.shape[-3] else bias
    return F.pad(of_heads, (0, more, 0, more)).expand(*bias.shape[:-2], -1, -1)


def _problem(q: Tensor, v: Tensor, bias: Tensor | None, partition: Partition) -> tuple[Any, ...]:
    """The heads and whether there is a bias, the target, and what else a tile is chosen by."""
    sizes = q.shape[-1], v.shape[-1], _arithmetic(q.dtype, q.device), partition.tokens
    return q.shape[-2], bias is not None, target_of(q.device), *sizes


@lru_cache(maxsize=4096)  # so that a hint is given once
def _forward_tile(heads: int, bias: bool, target: str, key: int, value: int, dtype: str, tokens: int) -> tiles.Tile:
    _hint("forward", ["forward"], heads, bias, target, key, value, dtype, tokens)
    return tiles.lookup(target, "forward", key, value, dtype, tokens, bias)


@lru_cache(maxsize=4096)
def _backward_tiles(
    heads: int, bias: bool, target: str, key: int, value: int, dtype: str, tokens: int
) -> tiles.BackwardTiles:
    chosen = tiles.backward(target, key, value, dtype, tokens, bias)
    steps = [step for step, tile in chosen._asdict().items() if tile is not None and (bias or step != "pairs")]
    first = next((step for step in ("group", "columns") if getattr(chosen, step)), None)  # the rest is not launched
    _hint("backward", [first] if first else steps, heads, bias, target, key, value, dtype, tokens)
    return chosen


def _hint(
    pass_: str, steps: list[str], heads: int, biased: bool, target: str, key: int, value: int, dtype: str, tokens: int
) -> None:
    """Says at level INFO, where a larger problem's tile serves, which command looks for a better one."""
    entries = (tiles.entry(target, step, key, value, dtype, tokens, biased) for step in steps)
    if others := [entry for entry in entries if not entry.is_made_for(key, value, tokens)]:
        LOGGER.info(
            "no tile was made for %s of %d tokens, K = %d, V = %d, %s, but for (%s), which serves; from a checkout, "
            "python -m bench tiles search --target %s --pass %s --tokens %d --widths %d %d --heads %d%s --dtype %s "
            "looks for a better one",
            pass_, tokens, key, value, dtype, others[0],
            others[0].target, pass_, tokens, key, value, heads, " --bias" * biased, dtype,
        )  # fmt: skip


@constant_in_graphs  # device, dtype and widths are constants of a graph; the tokens need not be
def _longest_group(device: torch.device, dtype: torch.dtype, key_width: int, value_width: int) -> int:
    """The most tokens of a group whose gradients one kernel computes."""
    return _longest_group_of(target_of(device), _arithmetic(dtype, device), key_width, value_width)


@lru_cache(maxsize=1024)
def _longest_group_of(target: str, arithmetic: str, key_width: int, value_width: int) -> int:
    longest = 0
    for tokens in (1 << i for i in range(12)):
        group = tiles.backward(target, key_width, value_width, arithmetic, tokens).group
        longest = tokens if group is not None and tokens <= group.block_m else longest
    return longest


def _arithmetic(dtype: torch.dtype, device: torch.device) -> str:
    """The dtype as `tiles` names it."""
    return "tf32" if precision_of(dtype, device) == "tf32" else str(dtype).removeprefix("torch.")


def precision_of(dtype: torch.dtype, device: torch.device) -> str:
    """How products of fp32 are multiplied: as torch's own matmul precision says, where the device has tf32."""
    allowed = dtype == torch.float32 and device.type == "cuda" and torch.version.hip is None
    return "tf32" if allowed and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def forget() -> None:
    """Forget what was looked up and compiled."""
    from .kernels import launch

    for looked_up in (_forward_tile, _backward_tiles, _longest_group_of):
        looked_up.cache_clear()
    launch.forget()


def target_of(device: torch.device) -> str:
    """The architecture, as `tiles` names it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return "xpu" if device.type == "xpu" else INTERPRETED_TARGET


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors'."""
    return torch.accelerator.device_index(device.index) if device.type in DEVICES else nullcontext()
