"""From layouts, a partition and tiles to launches: which kernels run, on what grid, with which arguments.

Nothing here needs a device or memory: tensors are seen as their `Layout`s, and a `Launch` says all that its binary
depends on. What tensors hold is said in `launch`, which runs launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, reduce
from operator import or_
from typing import Any, NamedTuple

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from isa_triton.axis import Axis, ceil_div
from isa_triton.backend.kernels.backward import (
    backward_columns_kernel,
    backward_group_kernel,
    backward_keys_kernel,
    backward_pairs_kernel,
    backward_queries_kernel,
)
from isa_triton.backend.kernels.common import Dropout, Pairs, Pixels, Places, Table
from isa_triton.backend.kernels.forward import forward_group_kernel, forward_kernel
from isa_triton.dropout import threshold
from isa_triton.partition import Partition
from isa_triton.tiles import BackwardTiles, Tile

IN_TURNS = 1024  # programs that take maps and groups in turns: about as many as a device holds
# The tensors of a pass, in the order of their layouts.
INPUTS = ("q", "k", "v", "bias", "scales", "valid", "seed", "table")
FORWARD = (*INPUTS, "out", "lse")
BACKWARD = (*INPUTS, "out", "lse", "do", "dlse", "dq", "dk", "dv", "delta", "partials")
Path = tuple[int, ...]  # to an argument, or to a part of one
# By Triton's names.
ELEMENTS = {
    "float16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32",
    "float64": "fp64",
    "uint8": "u8",
    "int32": "i32",
    "int64": "i64",
}


class Layout(NamedTuple):
    """All of a tensor but what it holds and where; `aligned` says that its first element lies at a multiple of 16."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: Any  # PyTorch's
    aligned: bool


Layouts = tuple[Any, ...]  # of a pass's tensors, each a `Layout`, or None where there is no tensor


class Pointer(NamedTuple):
    """A tensor's place among the arguments of a launch, and what a compiler may assume of it."""

    name: str  # of the tensor
    element: str  # Triton's name of its dtype
    aligned: bool  # to 16 bytes
    near: bool  # every element lies within 2 GiB


class Launch(NamedTuple):
    """A launch of a kernel, its tensors left open.

    Attributes:
        kernel: of `forward` or `backward`.
        programs: of its grid, which has one axis.
        arguments: by name and in the kernel's order; tensors are `Pixels` or the like whose data is a `Pointer`.
        options: of the compiler.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    def specialised(self, target: GPUTarget) -> tuple[dict[str, Any], dict[Path, Any], dict[Path, Any]]:
        """What a binary of it depends on beside the options, as Triton takes it: types, constants and attributes.

        A binary serves all integers but those that are constants here: which of them 16 divides, or are 1, is what
        Triton would make another of, and resolutions are many. How rows are aligned is in the strides' unit. Of one
        kind it matters: with tokens in rows of a multiple of 16, and in so many rows, a compiler finds a block's rows
        and columns in fewer registers, without which some kernels spill. Maps that the partition divides have another
        binary than those with tokens outside, for which nothing is tested.
        """
        types, constants, attributes = dict[str, Any](), dict[Path, Any](), dict[Path, Any]()
        attributes_of = make_backend(target).parse_attr

        def type_of(value: Any, path: Path) -> Any:
            if isinstance(value, Pointer):
                attributes[path] = attributes_of("D" * value.aligned + "S" * value.near)
                return f"*{value.element}"
            if isinstance(value, tuple):
                parts = [type_of(part, (*path, i)) for i, part in enumerate(value)]
                return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
            if isinstance(value, float):
                return "fp32"
            if type(value) is int and not self.kernel.params[path[0]].is_constexpr:
                return "i32" if -(2**31) <= value < 2**31 else "i64"
            constants[path] = value.value if isinstance(value, tl.constexpr) else value
            return "constexpr"

        for i, (name, value) in enumerate(self.arguments.items()):
            types[name] = type_of(value, (i,))
        for i, axis in reversed(list(enumerate(self.arguments["axes"]))):
            if axis.tokens % 16:
                break
            attributes[list(types).index("axes"), i, type(axis)._fields.index("tokens")] = attributes_of("D")
        return types, constants, attributes


def forward(
    layouts: Layouts,
    scale: float,
    partition: Partition,
    tile: Tile,
    precision: str,
    dropout_p: float = 0.0,
    cosine: bool = False,
) -> Iterator[Launch]:
    """The launch of the forward pass; its tensors are `FORWARD`."""
    given = _given(FORWARD, layouts, scale, partition, precision, dropout_p, cosine)
    maps, heads = layouts[0].shape[0], layouts[0].shape[-2]
    items = maps * partition.groups
    if in_one_block(tile, partition):
        tables = _tables(heads, given["maps"])
        slots = _slots(items * heads // tables, tables) if tables else 0
        given |= {"items": items, "slots": slots, "BLOCK": tile.block_n}
        yield from _launch(forward_group_kernel, slots * tables, given, tile)
    else:
        given |= {"ONE_BLOCK": partition.tokens <= tile.block_n}
        yield from _launch(forward_kernel, items * heads * ceil_div(partition.tokens, tile.block_m), given, tile)


def backward(
    layouts: Layouts,
    scale: float,
    partition: Partition,
    tiles: BackwardTiles,
    precision: str,
    dropout_p: float = 0.0,
    cosine: bool = False,
) -> Iterator[Launch]:
    """The launches of the backward pass; its tensors are `BACKWARD`."""
    given = _given(BACKWARD, layouts, scale, partition, precision, dropout_p, cosine)
    maps, heads = layouts[0].shape[0], layouts[0].shape[-2]
    items, partials, tokens = maps * partition.groups, layouts[-1], partition.tokens
    if partials is None:
        given |= {"items": items, "slots": _slots(items, heads), "maps": None}
    else:
        given |= {"items": items, "slots": partials.shape[0]}
    tables = _tables(heads, given["maps"])
    if in_one_kernel(tiles, partition):
        tile = tiles.group or tiles.keys
        yield from _launch(backward_group_kernel, given["slots"] * tables, given | {"BLOCK": tile.block_m}, tile)
        return

    if (columns := columns_tile(tiles, partition, given["K"], given["V"])) is not None:
        only = {} if partials is not None else {"delta": None}  # which the pass over pairs alone needs
        yield from _launch(backward_columns_kernel, items * heads, given | only, columns)
    else:
        yield from _passes(given, items * heads, tokens, tiles)
    if partials is not None:
        programs = partials.shape[0] * tables * _blocks_of_pairs(tiles, partition)
        yield from _launch(backward_pairs_kernel, programs, given, tiles.pairs)


def _slots(items: int, others: int) -> int:
    """How many programs take so many items in turns, beside as many for each of the others: of heads, or of pairs."""
    return min(items, max(1, IN_TURNS // max(1, others)))


def _tables(heads: int, maps: int | None) -> int:
    """How many biases there are: for each head, and for each map (which may be none) where a map has its own."""
    return heads if maps is None else heads * maps


def _passes(given: dict[str, Any], items: int, tokens: int, tiles: BackwardTiles) -> Iterator[Launch]:
    """dq, then dk and dv; an item is one head of a group."""
    given = given | {"WIDTH_K": padded(given["K"]), "WIDTH_V": padded(given["V"])}
    tile = tiles.queries
    one_block = {"ONE_BLOCK": tokens <= tile.block_n}
    yield from _launch(backward_queries_kernel, items * ceil_div(tokens, tile.block_m), given | one_block, tile)
    passes = [(tiles.keys, {})] if tiles.values is None else [(tiles.keys, {"dv": None}), (tiles.values, {"dk": None})]
    for tile, left_out in passes:
        more = {"ONE_BLOCK": tokens <= tile.block_m} | left_out
        yield from _launch(backward_keys_kernel, items * ceil_div(tokens, tile.block_n), given | more, tile)


def in_one_block(tile: Tile, partition: Partition) -> bool:
    """Whether a group is one block of queries and keys: `forward` takes groups in turns, and keeps a bias on chip."""
    return partition.tokens <= tile.block_m == tile.block_n


def in_one_kernel(tiles: BackwardTiles, partition: Partition) -> bool:
    """Whether `backward` is one kernel, which needs q, k, v and bias only: the group fits in its block."""
    return tiles.group is not None and partition.tokens <= tiles.group.block_m


def columns_tile(tiles: BackwardTiles, partition: Partition, key_width: int, value_width: int) -> Tile | None:
    """The tile of dq, dk and dv in one kernel, where queries fit in its block, and widths in its chunks."""
    tile = tiles.columns
    if tile is None or partition.tokens > tile.block_m or key_width > tile.block_k or value_width > tile.block_v:
        return None
    return tile


def bias_partials_shape(
    maps: int, heads: int, partition: Partition, tiles: BackwardTiles, per_map: bool = False
) -> tuple[int, int, int, int]:
    """Shape [slots, heads, tokens, tokens] of the partial sums of dbias: bounded, and the same on every device.

    Of a bias for each map it is [slots, maps * heads, tokens, tokens].
    """
    tables, items = (maps * heads, partition.groups) if per_map else (heads, maps * partition.groups)
    return _slots(items, tables * _blocks_of_pairs(tiles, partition)), tables, partition.tokens, partition.tokens


def _blocks_of_pairs(tiles: BackwardTiles, partition: Partition) -> int:
    if in_one_kernel(tiles, partition):
        return 1
    return ceil_div(partition.tokens, tiles.pairs.block_m) * ceil_div(partition.tokens, tiles.pairs.block_n)


def whole_rows(tokens: int, itemsize: int) -> int:
    """Rows and columns of a bias whose rows are loaded 16 bytes at a time: those beyond the tokens are zeros."""
    together = 16 // itemsize
    return ceil_div(tokens, together) * together


def padded(width: int) -> int:
    """The width as a power of two that matrix units take."""
    return max(16, 1 << (width - 1).bit_length())


# -- arguments ---------------------------------------------------------------------------------------------------------


def _launch(kernel: Any, programs: int, given: dict[str, Any], tile: Tile) -> Iterator[Launch]:
    """Nothing for a grid of no programs. Contraction is said, as Triton's default is about to change."""
    if programs:
        blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_V": tile.block_v}
        blocks["FULL"] = given["all_inside"] and given["tokens"] % tile.block_n == 0
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}
        yield Launch(kernel, programs, {name: (blocks | given)[name] for name in kernel.arg_names}, options)


def _given(
    names: tuple[str, ...],
    layouts: Layouts,
    scale: float,
    partition: Partition,
    precision: str,
    dropout_p: float,
    cosine: bool,
) -> Any:
    """What all kernels are given, by the names of their arguments."""

    def tensor(name: str, of: Layout) -> Any:
        pointer = _pointer(name, of)
        if name in ("scales", "seed", "table"):
            return pointer
        return _pairs(pointer, of) if name in ("bias", "partials") else _pixels(pointer, of, len(partition))

    given = zip(names, layouts, strict=True)
    tensors = {name: None if of is None else tensor(name, of) for name, of in given}
    (maps, *_, heads, key_width), (*_, key_heads, value_width) = layouts[0].shape, layouts[2].shape
    bias = layouts[names.index("bias")]
    per_map = bias is not None and len(bias.shape) == 4
    all_inside = partition.divides and tensors["table"] is None
    axes: tuple[Any, ...] = tuple(_axis(axis, partition.groups == 1, all_inside) for axis in partition)
    if (table := tensors.pop("table")) is not None:
        axes = (Table(table, partition.groups, partition.tokens),)
    numbers = {"scale": float(scale), "heads": _one(heads), "maps": maps if per_map else None, "axes": axes}
    numbers |= {"tokens": partition.tokens, "all_inside": all_inside}
    share = heads // key_heads if key_heads else 1  # heads of queries to one of keys
    tensors["dropout"] = seed = tensors.pop("seed")
    if seed is not None:
        tensors["dropout"] = _dropout(seed, layouts[names.index("seed")].shape[0], dropout_p)
    constants = {"K": key_width, "V": value_width, "SHARE": share, "COSINE": cosine, "PRECISION": precision}
    return tensors | numbers | constants


def _dropout(seed: Pointer, calls: int, dropout_p: float) -> Dropout:
    """The threshold's 32 bits are an i32, whatever they are."""
    return Dropout(seed, _one(calls), (threshold(dropout_p) ^ 2**31) - 2**31, 1 / (1 - dropout_p))


def _one(n: int) -> Any:
    """An integer that a layer has for all its maps: 1 is a constant, which saves registers."""
    return tl.constexpr(1) if n == 1 else n


@lru_cache(maxsize=1024)
def _axis(axis: Axis, whole: bool, all_inside: bool) -> Places:
    """An axis as kernels take it: the origin is a constant, so that only shifted windows test for pixels >= 0.

    So is whether they go on at the other end of the axis.

    Args:
        axis: of a partition.
        whole: the map is one group.
        all_inside: the partition divides the map: to test a token, every column of scores would be divided into its
            places on the axes.
    """
    groups = _one(axis.groups) if whole else axis.groups
    group_stride, token_stride = _one(axis.group_stride), _one(axis.token_stride)
    origin, cyclic = tl.constexpr(axis.origin), tl.constexpr(axis.wraps)
    of_map = axis.size, groups, axis.tokens, group_stride, token_stride
    return Places(*of_map, origin, cyclic, tl.constexpr(all_inside))


def _pointer(name: str, of: Layout) -> Pointer:
    extent = 1 + sum((n - 1) * abs(stride) for n, stride in zip(of.shape, of.stride, strict=True))
    return Pointer(name, ELEMENTS[str(of.dtype).removeprefix("torch.")], of.aligned, extent * of.dtype.itemsize < 2**31)


def _unit(together: int, itemsize: int) -> int:
    """The largest power of two, of at most 16 bytes, that divides all of some integers, given their bitwise or."""
    return min(together & -together or 8, 16 // itemsize)


def _pixels(pointer: Pointer, of: Layout, axes: int) -> Pixels:
    batch, *of_axes, head = of.stride[: 2 + axes]
    (channel,) = of.stride[2 + axes :] or (1,)  # lse, dlse and delta have a number a token
    unit = _unit(reduce(or_, (batch, *of_axes, head)), of.dtype.itemsize)
    *before, last = (stride // unit for stride in of_axes)
    strides = batch // unit, (*before, _one(last)), _one(head // unit)
    return Pixels(pointer, *strides, _one(channel), tl.constexpr(unit))


def _pairs(pointer: Pointer, of: Layout) -> Pairs:
    *before, head, query, key = of.stride  # of partials, which are contiguous, heads of the next slot follow
    batch = before[0] if pointer.name == "bias" and before else 0
    tokens = of.shape[-1]
    unit = _unit(batch | head | query | tokens, of.dtype.itemsize)
    batch = batch // unit or tl.constexpr(0)
    return Pairs(pointer, batch, head // unit, query // unit, _one(key), tokens // unit, tl.constexpr(unit))
