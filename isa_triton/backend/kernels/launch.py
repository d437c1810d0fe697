"""Launchers: from tensors, a partition and tiles to kernel launches. They allocate nothing and choose nothing.

Tensors are anything with `shape`, `stride()` and a data pointer, on the current device, with any strides:

    q, k, dq, dk       [B, H, W, heads, K]           fp16, bf16 or fp32, all four tensors q, k, v, do alike
    v, out, do, dv     [B, H, W, heads, V]
    lse, dlse, delta   [B, H, W, heads]              fp32
    bias               [heads, tokens, tokens]       any float
    dbias_partials     [slots, heads, tokens, tokens], contiguous, fp32
"""

from functools import lru_cache
from typing import Any

import triton.language as tl

from isa_triton.backend.kernels.backward import (
    backward_group_kernel,
    backward_keys_kernel,
    backward_pairs_kernel,
    backward_queries_kernel,
)
from isa_triton.backend.kernels.common import Pairs, Pixels
from isa_triton.backend.kernels.forward import forward_group_kernel, forward_kernel
from isa_triton.partition import Axis, Partition, ceil_div
from isa_triton.tiles import BackwardTiles, Tile

PARTIAL_SUMS = (
    1024  # programs that take maps and groups in turns, for a bias or its gradient: about what a device holds
)


def forward(
    q: Any, k: Any, v: Any, bias: Any | None, out: Any, lse: Any | None, scale: float, partition: Partition, tile: Tile,
    precision: str = "ieee",
) -> None:  # fmt: skip
    """Write out = softmax(scale * q k^T + bias) v within every group, and lse where it is not None.

    Args:
        tile: a group of at most `tile.block_n` tokens is one block of keys.
        precision: of products of fp32, as `tl.dot` names it: "ieee", "tf32" or "tf32x3".
    """
    maps, heads = q.shape[0], q.shape[3]
    programs = maps * partition.groups * heads * ceil_div(partition.tokens, tile.block_m)
    if not programs:
        return
    if bias is not None and partition.tokens <= tile.block_m == tile.block_n:
        items = maps * partition.groups
        slots = min(items, max(1, PARTIAL_SUMS // heads))
        forward_group_kernel[(slots * heads,)](
            _pixels(q), _pixels(k), _pixels(v), _pairs(bias), _pixels(out), _pixels(lse), float(scale), heads, items,
            slots, *_axes(partition), BLOCK=tile.block_n, BLOCK_K=tile.block_k, BLOCK_V=tile.block_v,
            **_constants(q, v, tile, precision),
        )  # fmt: skip
    else:
        forward_kernel[(programs,)](
            _pixels(q), _pixels(k), _pixels(v), _pairs(bias), _pixels(out), _pixels(lse), float(scale), heads,
            *_axes(partition), ONE_BLOCK=partition.tokens <= tile.block_n, **_blocks(tile),
            **_constants(q, v, tile, precision),
        )  # fmt: skip


def backward(
    q: Any, k: Any, v: Any, bias: Any | None, out: Any | None, lse: Any | None, do: Any, dlse: Any | None,
    dq: Any, dk: Any, dv: Any, delta: Any | None, dbias_partials: Any | None, scale: float, partition: Partition,
    tiles: BackwardTiles, precision: str = "ieee",
) -> None:  # fmt: skip
    """Write dq, dk, dv and partial sums of dbias, which the caller adds over their first dimension.

    Args:
        out, lse: what forward wrote; like delta, not looked at where `in_one_kernel` holds.
        dlse: the gradient of lse, or None for zero.
        delta: scratch.
        dbias_partials: of the shape that `bias_partials_shape` says, or None where dbias is not wanted.
        precision: as in `forward`.
    """
    heads, items = q.shape[3], q.shape[0] * partition.groups
    slots = items if dbias_partials is None else dbias_partials.shape[0]
    if not items * heads:
        return
    inputs = _pixels(q), _pixels(k), _pixels(v), _pairs(bias)
    partials = None if dbias_partials is None else _pairs(dbias_partials.flatten(0, 1))
    do, dlse, dq, dk, dv = map(_pixels, (do, dlse, dq, dk, dv))
    scaling = float(scale), heads

    if in_one_kernel(tiles, partition):
        tile = tiles.group or tiles.keys
        backward_group_kernel[(slots * heads,)](
            *inputs, do, dlse, dq, dk, dv, partials, *scaling, items, slots, *_axes(partition),
            BLOCK=tile.block_m, BLOCK_K=tile.block_k, BLOCK_V=tile.block_v, **_constants(q, v, tile, precision),
        )  # fmt: skip
        return

    out, lse, delta = map(_pixels, (out, lse, delta))
    width_k, width_v = padded(q.shape[4]), padded(v.shape[4])
    tile = tiles.queries
    backward_queries_kernel[(items * heads * ceil_div(partition.tokens, tile.block_m),)](
        *inputs, out, lse, do, dlse, dq, delta, *scaling, *_axes(partition),
        WIDTH_K=width_k, ONE_BLOCK=partition.tokens <= tile.block_n, **_blocks(tile),
        **_constants(q, v, tile, precision),
    )  # fmt: skip
    passes = [(tiles.keys, dk, dv)] if tiles.values is None else [(tiles.keys, dk, None), (tiles.values, None, dv)]
    for tile, *outputs in passes:
        backward_keys_kernel[(items * heads * ceil_div(partition.tokens, tile.block_n),)](
            *inputs, lse, delta, do, *outputs, *scaling, *_axes(partition),
            WIDTH_K=width_k, WIDTH_V=width_v, ONE_BLOCK=partition.tokens <= tile.block_m, **_blocks(tile),
            **_constants(q, v, tile, precision),
        )  # fmt: skip
    if partials is not None:
        tile = tiles.pairs
        backward_pairs_kernel[(slots * heads * _blocks_of_pairs(tiles, partition),)](
            *inputs, lse, delta, do, partials, *scaling, items, slots, *_axes(partition),
            **_blocks(tile), **_constants(q, v, tile, precision),
        )  # fmt: skip


def in_one_kernel(tiles: BackwardTiles, partition: Partition) -> bool:
    """Whether `backward` is one kernel, which needs q, k, v and bias only: the group fits in its block."""
    return tiles.group is not None and partition.tokens <= tiles.group.block_m


def bias_partials_shape(maps: int, heads: int, partition: Partition, tiles: BackwardTiles) -> tuple[int, int, int, int]:
    """Shape [slots, heads, tokens, tokens] of the partial sums of dbias: bounded, and the same on every device."""
    slots = max(1, PARTIAL_SUMS // max(1, heads * _blocks_of_pairs(tiles, partition)))
    return min(slots, maps * partition.groups), heads, partition.tokens, partition.tokens


def _blocks_of_pairs(tiles: BackwardTiles, partition: Partition) -> int:
    if in_one_kernel(tiles, partition):
        return 1
    return ceil_div(partition.tokens, tiles.pairs.block_m) * ceil_div(partition.tokens, tiles.pairs.block_n)


@lru_cache(maxsize=1024)
def _axes(partition: Partition) -> tuple[Axis, ...]:
    """The axes as kernels take them: the origin is a constant, so that only shifted windows test for y, x >= 0."""
    return tuple(axis._replace(origin=tl.constexpr(axis.origin)) for axis in partition)


_UNITS = {unit: tl.constexpr(unit) for unit in (1, 2, 4, 8)}


def _unit(together: int, itemsize: int) -> int:
    """The largest power of two, of at most 16 bytes, that divides all of some integers, given their bitwise or."""
    return min(together & -together or 8, 16 // itemsize)


def _pixels(tensor: Any | None) -> Pixels | None:
    if tensor is None:
        return None
    batch, y, x, head, *channel = tensor.stride()
    unit = _unit(batch | y | x | head, tensor.itemsize)
    strides = batch // unit, y // unit, x // unit, head // unit
    return Pixels(tensor, *strides, channel[0] if channel else 1, _UNITS[unit])


def _pairs(tensor: Any | None) -> Pairs | None:
    if tensor is None:
        return None
    (head, query, key), tokens = tensor.stride(), tensor.shape[1]
    unit = _unit(head | query | tokens, tensor.itemsize)
    return Pairs(tensor, head // unit, query // unit, key, tokens // unit, _UNITS[unit])


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_V": tile.block_v}


def _constants(q: Any, v: Any, tile: Tile, precision: str) -> dict[str, Any]:
    """The rest of a kernel's constants and its options; contraction is said, as Triton's default is about to change."""
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
    return {"K": q.shape[4], "V": v.shape[4], "PRECISION": precision, **options}


def padded(width: int) -> int:
    """The width as a power of two that matrix units take."""
    return max(16, 1 << (width - 1).bit_length())
