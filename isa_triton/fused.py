"""Attention over a partition by the Triton kernels: allocate, choose tiles, launch on the tensors' device.

The counterpart of `eager`, with the same shapes. Where a group fits in one block, backward needs q, k, v and bias
alone; longer groups want out and lse too (`keeps_output`).
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import tiles
from .eager import empty_gradients, empty_outputs
from .partition import Partition

try:
    from .kernels import launch
except ModuleNotFoundError as missing:
    if str(missing.name).split(".")[0] != "triton":
        raise
    launch = None  # type: ignore[assignment]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda
INTERPRETED_TARGET = "sm_80"  # whose tiles Triton's interpreter runs with


def why_not(q: Tensor) -> str | None:
    """Why the kernels cannot take tensors like q, or None if they can; tensors without memory never meet a kernel."""
    if launch is None:
        return "triton is not installed (pip install triton)"
    if q.dtype not in DTYPES:
        return f"the kernels take {', '.join(map(str, DTYPES))}, not {q.dtype}"
    kind = q.device.type
    if kind in DEVICES or kind == "meta" or isinstance(q, FakeTensor):
        return None
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"the kernels run on {' and '.join(DEVICES)} devices, or interpreted (TRITON_INTERPRET=1), not on {q.device}"


def keeps_output(q: Tensor, v: Tensor, partition: Partition) -> bool:
    """Whether backward needs out and lse: a group does not fit in one block."""
    widths = int(q.shape[-1]), int(v.shape[-1])  # constants of every kernel, so a symbolic width becomes one here
    return partition.tokens > _longest_group(q.device, q.dtype, *widths)


def forward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, partition: Partition, with_lse: bool
) -> tuple[Tensor, Tensor]:
    """As `eager.forward`."""
    q, k, v, bias = map(_in_memory, (q, k, v, bias))
    out, lse = empty_outputs(q, v, with_lse)
    tile = tiles.lookup(
        _target(q.device), "forward", q.shape[-1], v.shape[-1], _arithmetic(q.dtype, q.device), partition.tokens
    )
    with _on(q.device):
        launch.forward(
            q, k, v, bias, out, lse if with_lse else None, scale, partition, tile, _precision(q.dtype, q.device)
        )
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    lse: Tensor | None,
    do: Tensor,
    dlse: Tensor | None,
    scale: float,
    partition: Partition,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `eager.backward`; out and lse are what forward returned, needed where `keeps_output` says so."""
    q, k, v, bias, do, dlse = map(_in_memory, (q, k, v, bias, do, dlse))
    dq, dk, dv, dbias = empty_gradients(q, k, v, bias)
    chosen = _backward_tiles(q, v, partition)
    delta = None if lse is None else torch.empty_like(lse)
    partials = None
    if bias is not None:
        shape = launch.bias_partials_shape(q.shape[0], q.shape[3], partition, chosen)
        partials = q.new_empty(shape, dtype=torch.float32)
    precision = _precision(q.dtype, q.device)
    with _on(q.device):
        launch.backward(
            q, k, v, bias, out, lse, do, dlse, dq, dk, dv, delta, partials, scale, partition, chosen, precision
        )  # fmt: skip
    if partials is not None:
        dbias.copy_(partials.sum(0))
    return dq, dk, dv, dbias


def _in_memory(x: Any) -> Any:
    """A tensor or None as kernels will read it: PyTorch negates lazily, by a bit beside the memory (`is_neg`)."""
    return x.resolve_neg() if x is not None and x.is_neg() else x


def _backward_tiles(q: Tensor, v: Tensor, partition: Partition) -> tiles.BackwardTiles:
    return tiles.backward(_target(q.device), q.shape[-1], v.shape[-1], _arithmetic(q.dtype, q.device), partition.tokens)


@torch.compiler.assume_constant_result  # device, dtype and widths are constants of a graph; the tokens need not be
def _longest_group(device: torch.device, dtype: torch.dtype, key_width: int, value_width: int) -> int:
    """The most tokens of a group whose gradients one kernel computes."""
    return _longest_group_of(_target(device), _arithmetic(dtype, device), key_width, value_width)


@lru_cache(maxsize=1024)
def _longest_group_of(target: str, arithmetic: str, key_width: int, value_width: int) -> int:
    longest = 0
    for tokens in (1 << i for i in range(12)):
        group = tiles.backward(target, key_width, value_width, arithmetic, tokens).group
        longest = tokens if group is not None and tokens <= group.block_m else longest
    return longest


def _arithmetic(dtype: torch.dtype, device: torch.device) -> str:
    """The dtype as `tiles` names it."""
    return "tf32" if _precision(dtype, device) == "tf32" else str(dtype).removeprefix("torch.")


def _precision(dtype: torch.dtype, device: torch.device) -> str:
    """How products of fp32 are multiplied: as torch's own matmul precision says, where the device has tf32."""
    allowed = dtype == torch.float32 and device.type == "cuda" and torch.version.hip is None
    return "tf32" if allowed and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _target(device: torch.device) -> str:
    """The architecture, as `tiles` names it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return properties.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{properties.major}{properties.minor}"
    return "xpu" if device.type == "xpu" else INTERPRETED_TARGET


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensors'."""
    return torch.accelerator.device_index(device.index) if device.type in DEVICES else nullcontext()
