"""Dropout of attention weights: whether one is kept is a hash of a seed and of where it stands, so nothing is stored.

Queries and keys are named by their pixels in the map, row by row, and extra keys by the numbers behind those, so masks
do not depend on the partition, on tiles, or on who computes. Arithmetic is that of 32 bits: int64 tensors masked here,
uint32 in kernels, which compile the very source of `mix`, `absorb`, `row_keys` and `draw`.

The mixer was found by https://github.com/skeeto/hash-prospector: two multiplications, by less than 2^31, so that int64
has their products.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def mix(x):  # type: ignore[no-untyped-def]  # tensors of torch or tl.tensors alike
    """32 bits, each of which depends on all 32 of x, one to one."""
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)


def absorb(state, number):  # type: ignore[no-untyped-def]
    """The state after one more number."""
    return mix(((state ^ number) + 0x9E3779B9) & 0xFFFFFFFF)


def row_keys(low, high, map_, head, pixel):  # type: ignore[no-untyped-def]
    """What the keys' numbers of one query begin with, and how far apart they are: odd, so no two are the same.

    A step for each query: with one for all, two queries might draw the same numbers for shifted keys.
    """
    state = absorb(absorb(absorb(absorb(0 * low, low), high), map_), head)
    return absorb(state, pixel), absorb(absorb(state, 0xFFFFFFFF), pixel) | 1


def draw(start, step, pixel):  # type: ignore[no-untyped-def]
    """The 32 bits of a query and a key, below `threshold` for weights that are dropped."""
    return mix((start + step * pixel) & 0xFFFFFFFF)


def threshold(dropout_p: float) -> int:
    """How many of the 2^32 numbers drop a weight.

    Examples:
        >>> threshold(0.25) / 2**32
        0.25
    """
    return int(dropout_p * 2**32)


def rows_of(seed: Tensor, maps: int, heads: int, pixels: int) -> tuple[Tensor, Tensor]:
    """`row_keys` of every query, [maps, pixels, heads] each.

    Args:
        seed: [calls], int64; each is of as many neighbouring heads, which it numbers from 0.
        maps: how many there are, with `heads` heads and `pixels` pixels.

    Examples:
        >>> rows_of(torch.tensor([3]), maps=2, heads=4, pixels=6)[0].shape
        torch.Size([2, 6, 4])
    """

    def numbers(count: int) -> Tensor:
        return torch.arange(count, device=seed.device)

    calls = seed.shape[0]
    head = numbers(heads // calls).repeat(calls)
    of_head = seed[:, None].expand(-1, heads // calls).reshape(-1)
    return row_keys(
        of_head & _LOW, (of_head >> 32) & _LOW, numbers(maps)[:, None, None], head, numbers(pixels)[:, None]
    )


def factors(start: Tensor, step: Tensor, pixel: Tensor, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """What weights are multiplied by: 0 where they are dropped, else 1 / (1 - p).

    Args:
        start, step: of `rows_of` the queries.
        pixel: of the keys, by number; all three broadcast.

    Examples:
        >>> start, step = rows_of(torch.tensor([3]), maps=1, heads=1, pixels=4)
        >>> sorted({*factors(start, step, torch.arange(9), 0.5, torch.float32).flatten().tolist()})
        [0.0, 2.0]
    """
    return (draw(start, step, pixel) >= threshold(dropout_p)).to(dtype) / (1 - dropout_p)
