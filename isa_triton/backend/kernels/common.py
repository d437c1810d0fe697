# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""What forward and backward share: which pixels a program owns, their rows in memory, scores, the online softmax.

Pixels are found by `coordinates` and by nothing else, so no kernel knows which partition it serves, nor of how many
axes: what is done for each axis is done when a kernel is compiled. A block of tokens in one tensor is a `Rows`: a
pointer to each, from which chunks of the width are loaded where they are needed.
"""

from types import FunctionType
from typing import Any, NamedTuple

import triton
import triton.language as tl

from isa_triton import axis, partition
from isa_triton import dropout as dropping

# The one source of geometry, here because Triton looks names up where a function stands, and those have no Triton.
along = triton.jit(FunctionType(axis.along.__code__, globals()))
coordinates = triton.jit(FunctionType(partition.coordinates.__code__, globals()))
flat_index = triton.jit(FunctionType(partition.flat_index.__code__, globals()))
# And of what is dropped.
mix = triton.jit(FunctionType(dropping.mix.__code__, globals()))
absorb = triton.jit(FunctionType(dropping.absorb.__code__, globals()))
row_keys = triton.jit(FunctionType(dropping.row_keys.__code__, globals()))
draw = triton.jit(FunctionType(dropping.draw.__code__, globals()))

LOG2_E = tl.constexpr(1.4426950408889634)
FIELDS_OF_TABLE = tl.constexpr(3)  # which no axis has
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32: a maximum over no key yet


class Pixels(NamedTuple):
    """A [B, H, W, heads, width] tensor, or of another number of axes, as kernels take it: where it begins, its strides.

    Strides between rows come in units, a constant: the compiler then knows how rows are aligned, at any width.
    """

    data: Any
    batch: int
    axes: tuple[int, ...]  # of the map
    head: int
    channel: int  # not in units
    unit: Any


class Pairs(NamedTuple):
    """A [heads, tokens, tokens] tensor, a number for each pair of query and key, or one for each map; in units."""

    data: Any
    batch: int  # 0 for one that all maps share
    head: int
    query: int
    key: int  # not in units
    tokens: int
    unit: Any


class Places(NamedTuple):
    """An `isa_triton.axis.Axis` as kernels take it: what all maps of a layer have in common is a constant."""

    size: int
    groups: int
    tokens: int
    group_stride: int
    token_stride: int
    origin: Any
    cyclic: Any  # whether a group lies across the seam
    all_inside: Any  # whether no token of the map lies outside, so that none is tested


class Table(NamedTuple):
    """In the place of axes: where the tokens of packed maps lie, [groups, tokens], -1 for none."""

    data: Any
    groups: int
    tokens: int


class Dropout(NamedTuple):
    """Which weights are dropped: those whose 32 bits are below a threshold; others are multiplied by a factor."""

    data: Any  # a seed for as many neighbouring heads as there are to each
    calls: int  # how many seeds
    threshold: int  # its bits, signed
    factor: float


class Tokens(NamedTuple):
    """A block of one group's tokens, in one head of one map; `inside` says which of them exist in the map."""

    batch: Any
    head: Any
    number: Any
    pixel: tuple[Any, ...]  # on every axis
    inside: Any


class Rows(NamedTuple):
    """A block of tokens in one tensor: a pointer to channel 0 of each, and how far apart the channels lie."""

    pointer: Any
    inside: Any
    channel: Any


@triton.jit
def unravel(program, blocks, heads):
    """Block, head and item of a program: neighbours share a group's keys first, then its pixels' cache lines."""
    return program % blocks, program // blocks % heads, program // blocks // heads


@triton.jit
def groups_of(axes):
    """How many groups a map has."""
    if len(axes) == 1:
        return axes[0].groups
    else:  # noqa: RET505
        return groups_of(axes[:-1]) * axes[-1].groups


@triton.jit
def tokens_of(axes):
    """How many tokens a group has, those outside the map counted."""
    if len(axes) == 1:
        return axes[0].tokens
    else:  # noqa: RET505
        return tokens_of(axes[:-1]) * axes[-1].tokens


@triton.jit
def places(group, token, axes):
    """`coordinates`, of axes or of a table."""
    if len(axes[0]) == FIELDS_OF_TABLE:
        table = axes[0]
        pixel = tl.load(table.data + group.to(tl.int64) * table.tokens + token, token < table.tokens, other=-1)
        return (pixel,), pixel >= 0
    else:  # noqa: RET505
        return coordinates(group, token, axes)


@triton.jit
def locate(item, head, start, axes, valid, BLOCK: tl.constexpr, FULL: tl.constexpr = False):
    """The `BLOCK` tokens from number `start` on of an item, one of the groups of all maps.

    Pixels that are not `valid`, where that is given, are like those outside the map; so are tokens beyond the group's,
    of which a block that is `FULL` has none.
    """
    groups = groups_of(axes)
    number = start + tl.arange(0, BLOCK)
    pixel, inside = places(item % groups, number, axes)
    tokens = Tokens(item // groups, head, number, pixel, inside if FULL else inside & (number < tokens_of(axes)))
    if valid is not None:
        exists = tl.load(rows(valid, tokens).pointer, tokens.inside, other=0) != 0
        tokens = Tokens(tokens.batch, head, number, pixel, tokens.inside & exists)
    return tokens


@triton.jit
def anew(number, step, TIME: tl.constexpr):
    """The number, in a step of a loop, which to compilers is another a second TIME (1 or 2): grids have one axis.

    They would keep the pixels of a block of tokens in registers while a loop goes on that has no use for them.
    """
    return number + (step + 1) * tl.program_id(TIME)


@triton.jit
def items_of(blocks, heads, items, slots, maps):
    """Block, map and head of a program that takes items in turns, and which: from the first on, before the last.

    Where `maps` is given, it takes those of one map alone, of as many; map 0 stands for all.
    """
    program = tl.program_id(0)
    if maps is None:
        block, head, slot = unravel(program, blocks, heads)
        return block, 0, head, slot, items
    else:  # noqa: RET505
        block, table, slot = unravel(program, blocks, maps * heads)
        of_map = items // maps
        first = table // heads * of_map
        return block, table // heads, table % heads, first + slot, first + of_map


@triton.jit
def shared(tokens, SHARE: tl.constexpr):
    """Tokens as the keys see them, whose heads have SHARE heads of queries each."""
    return Tokens(tokens.batch, tokens.head // SHARE, tokens.number, tokens.pixel, tokens.inside)


@triton.jit
def scale_of(scale, scales, head):
    """The factor of a head's scores: one for all heads, or its own."""
    return scale if scales is None else scale * tl.load(scales + head).to(tl.float32)


@triton.jit
def down(tokens):
    """Tokens that number the rows of a matrix."""
    return Tokens(tokens.batch, tokens.head, tokens.number[:, None], tokens.pixel, tokens.inside[:, None])


@triton.jit
def across(tokens):
    """Tokens that number the columns of a matrix."""
    return Tokens(tokens.batch, tokens.head, tokens.number[None, :], tokens.pixel, tokens.inside[None, :])


@triton.jit
def rows(pixels, tokens):
    """Where the tokens lie in a tensor. Offsets are 64-bit: even one map may exceed 2^31 elements."""
    start = tokens.batch.to(tl.int64) * pixels.batch + tokens.head.to(tl.int64) * pixels.head
    offset = tokens.pixel[0].to(tl.int64) * pixels.axes[0]
    for i in tl.static_range(1, len(pixels.axes)):
        offset += tokens.pixel[i].to(tl.int64) * pixels.axes[i]
    return Rows(pixels.data + start * pixels.unit + offset * pixels.unit, tokens.inside, pixels.channel)


@triton.jit
def cells(rows, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to `BLOCK` channels of every row from `start` on, and which of them exist."""
    channel = start + tl.arange(0, BLOCK)
    pointer = rows.pointer[:, None] + channel.to(tl.int64)[None, :] * rows.channel
    return pointer, rows.inside[:, None] & (channel < WIDTH)[None, :]  # [rows, BLOCK]


@triton.jit
def load(rows, start, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pointer, exists = cells(rows, start, WIDTH, BLOCK)
    return tl.load(pointer, exists, other=0.0)


@triton.jit
def store(rows, start, values, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pointer, exists = cells(rows, start, WIDTH, BLOCK)
    tl.store(pointer, values.to(rows.pointer.dtype.element_ty), exists)


@triton.jit
def inner_products(a, b, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T, a chunk of the width at a time."""
    product = tl.zeros([a.inside.shape[0], b.inside.shape[0]], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        a_chunk, b_chunk = load(a, start, WIDTH, BLOCK), load(b, start, WIDTH, BLOCK)
        product = tl.dot(a_chunk, b_chunk.T, product, input_precision=PRECISION)
    return product  # [rows of a, rows of b]


# Cosines are products of vectors as they are, times a factor a row and one a column, which make vectors of length 1.
# Factors are a tuple, of one, or of nothing where there are none: Triton 3.6 cannot return None.


@triton.jit
def sums_of_squares(chunk):
    """Of every row, in fp32."""
    wide = chunk.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def inverse_lengths(squares):
    """From sums of squares; what is shorter than 1e-12 counts as that."""
    return (tl.rsqrt(tl.maximum(squares, 1e-24)),)


@triton.jit
def lengths_inverted(a, WIDTH: tl.constexpr, BLOCK: tl.constexpr, COSINE: tl.constexpr):
    """Those of rows, for the `similarities` of all columns."""
    if COSINE:
        squares = tl.zeros([a.inside.shape[0]], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            squares += sums_of_squares(load(a, start, WIDTH, BLOCK))
        return inverse_lengths(squares)
    else:  # noqa: RET505
        return ()


@triton.jit
def similarities(a, b, of_a, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, COSINE: tl.constexpr):
    """a b^T, a chunk of the width at a time, and the factors of a and of b, where it is of cosines: b's are in it.

    Factors of a that are given are not found again.
    """
    if COSINE:
        product = tl.zeros([a.inside.shape[0], b.inside.shape[0]], tl.float32)
        a_squares, b_squares = tl.zeros([a.inside.shape[0]], tl.float32), tl.zeros([b.inside.shape[0]], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            a_chunk, b_chunk = load(a, start, WIDTH, BLOCK), load(b, start, WIDTH, BLOCK)
            if len(of_a) == 0:
                a_squares += sums_of_squares(a_chunk)
            b_squares += sums_of_squares(b_chunk)
            product = tl.dot(a_chunk, b_chunk.T, product, input_precision=PRECISION)
        if len(of_a) == 0:
            of_a = inverse_lengths(a_squares)
        of_b = inverse_lengths(b_squares)
        return by_columns(product, of_b), of_a, of_b
    else:  # noqa: RET505
        return inner_products(a, b, WIDTH, BLOCK, PRECISION), (), ()


@triton.jit
def by_columns(product, factors):
    return product if len(factors) == 0 else product * factors[0][None, :]


@triton.jit
def by_rows(x, factors):
    """A number, or a matrix, times the factors of rows."""
    return x if len(factors) == 0 else x * factors[0][:, None]


@triton.jit
def normalised(chunk, factors):
    """Rows of length 1."""
    return by_rows(chunk.to(tl.float32), factors).to(chunk.dtype) if len(factors) > 0 else chunk


@triton.jit
def pairs(numbers, start, query, key):
    """Pointers to the numbers of every query and key of a table that begins so many units on, and which exist."""
    tokens = numbers.tokens * numbers.unit
    row = start + query.number.to(tl.int64) * numbers.query
    column = key.number.to(tl.int64) * numbers.key
    return numbers.data + row * numbers.unit + column, (query.number < tokens) & (key.number < tokens)


@triton.jit
def unit(bias):
    """What scores are multiplied by: log2(e), so that exp2 takes them as they are; 1 with a bias.

    For log2(e) times a bias may be beyond fp32, where it stands for minus infinity.
    """
    return LOG2_E if bias is None else 1.0


@triton.jit
def exp(score, bias):
    """e to the power of a difference of scores."""
    return tl.exp2(score) if bias is None else tl.exp2(score * LOG2_E)


@triton.jit
def load_bias(bias, query, key):
    """The bias of every pair, zero where there is none."""
    start = query.head.to(tl.int64) * bias.head
    if bias.batch != 0:
        start += query.batch.to(tl.int64) * bias.batch
    pointer, exists = pairs(bias, start, query, key)
    return tl.load(pointer, exists, other=0.0).to(tl.float32)


@triton.jit
def biased(product, scale, bias_block, key):
    """unit * (scale * q k^T + bias), and minus infinity for keys outside the map; the bias as loaded, or None."""
    score = product * (scale * unit(bias_block))
    if bias_block is not None:
        score += bias_block
    return tl.where(key.inside, score, float("-inf"))


@triton.jit
def scores(product, scale, bias, query, key):
    """`biased`, with a bias that lies in memory."""
    return biased(product, scale, None if bias is None else load_bias(bias, query, key), key)


@triton.jit
def weigh(score, row_max, bias):
    """exp(score - maximum) of every key, and the maximum: of a row's scores and what it was, at first LOWEST.

    It is finite, so keys outside the map or with a bias of minus infinity have weight zero, even where all are such.
    """
    new_max = tl.maximum(row_max, tl.max(score, 1))
    return exp(score - new_max[:, None], bias), new_max


@triton.jit
def fold_softmax(score, row_max, row_sum, bias):
    """Fold a block of keys into each row's maximum and sum; `shrink` adapts what was summed under the old maximum."""
    weight, new_max = weigh(score, row_max, bias)
    shrink = exp(tl.maximum(row_max - new_max, LOWEST / 2), bias)  # no less, or it overflows times log2(e)
    return weight, shrink, new_max, row_sum * shrink + tl.sum(weight, 1)


@triton.jit
def divisor(row_sum):
    """What weights are divided by: their sum. The largest is 1, so only rows without keys have less; they stay zero."""
    return tl.maximum(row_sum, 1.0, propagate_nan=tl.PropagateNan.ALL)[:, None]


@triton.jit
def log_sum_exp(row_max, row_sum, bias):
    """lse, natural; minus infinity for rows without keys."""
    return row_max * (1.0 / unit(bias)) + tl.log(row_sum)


@triton.jit
def kept(dropout, heads, query, key, axes, TRANSPOSED: tl.constexpr = False):
    """What weights are multiplied by, [queries, keys] or transposed: 0 where dropped. Nothing without dropout.

    A tuple, of one or of nothing: Triton 3.6 cannot return None.
    """
    if dropout is None:
        return ()
    else:  # noqa: RET505
        of_call = heads // dropout.calls
        seed = tl.load(dropout.data + query.head // of_call)
        low, high = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
        head, query_pixel = (query.head % of_call).to(tl.uint32), flat_index(query.pixel, axes).to(tl.uint32)
        start, step = row_keys(low, high, query.batch.to(tl.uint32), head, query_pixel)  # [queries]
        key_pixel = flat_index(key.pixel, axes).to(tl.uint32)
        if TRANSPOSED:
            drawn = draw(start[None, :], step[None, :], key_pixel[:, None])
        else:
            drawn = draw(start[:, None], step[:, None], key_pixel[None, :])
        return (tl.where(drawn >= dropout.threshold.to(tl.uint32), dropout.factor, 0.0),)


@triton.jit
def dropped(x, factors):
    """Weights, or gradients of weights, after dropout."""
    return x if len(factors) == 0 else (x * factors[0]).to(x.dtype)


@triton.jit
def anywhere(tokens):
    """Tokens as if inside the map, where that does not matter: to find out takes divisions, for each in each layout."""
    return Tokens(tokens.batch, tokens.head, tokens.number, tokens.pixel, tl.full([], True, tl.int1))
