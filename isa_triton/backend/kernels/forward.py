# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""The forward kernel."""

import triton
import triton.language as tl

from isa_triton.backend.kernels.common import (
    LOWEST,
    across,
    anew,
    biased,
    by_rows,
    divisor,
    down,
    dropped,
    fold_softmax,
    groups_of,
    items_of,
    kept,
    lengths_inverted,
    load,
    load_bias,
    locate,
    log_sum_exp,
    rows,
    scale_of,
    scores,
    shared,
    similarities,
    store,
    tokens_of,
    unravel,
    weigh,
)


@triton.jit
def forward_kernel(
    q, k, v, bias, scales, valid, dropout, out, lse, scale, heads, axes,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FULL: tl.constexpr, SHARE: tl.constexpr, COSINE: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale * q k^T + bias) v and lse = log sum exp, within every group.

    A program takes BLOCK_M queries of a group: grid (maps * groups * heads * query blocks,).
    A group that fits in one block of keys is scored once and its softmax is exact, however many chunks the value
    width has. A longer one is folded block by block, online, and scored once a chunk.
    """
    tokens = tokens_of(axes)
    block, head, item = unravel(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), heads)
    first = block * BLOCK_M
    query = locate(item, head, first, axes, valid, BLOCK_M)
    q_rows, scale = rows(q, query), scale_of(scale, scales, head)
    row_max, row_sum = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    if ONE_BLOCK:
        key = locate(item, head, 0, axes, valid, BLOCK_N, FULL)
        k_rows = rows(k, shared(key, SHARE))
        product, of_q, _ = similarities(q_rows, k_rows, (), K, BLOCK_K, PRECISION, COSINE)  # [BLOCK_M, BLOCK_N]
        score = scores(product, by_rows(scale, of_q), bias, down(query), across(key))
        weight, _, row_max, row_sum = fold_softmax(score, row_max, row_sum, bias)
        weight = dropped(weight, kept(dropout, heads, query, key, axes))
    else:
        of_q = lengths_inverted(q_rows, K, BLOCK_K, COSINE)

    for chunk in range(0, V, BLOCK_V):
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        if ONE_BLOCK:
            values = load(rows(v, shared(key, SHARE)), chunk, V, BLOCK_V)  # [BLOCK_N, BLOCK_V]
            acc = tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)
            to = query
        else:
            row_max, row_sum = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)
            q_rows = rows(q, locate(item, head, anew(first, chunk, 1), axes, valid, BLOCK_M))
            for start in range(0, tokens, BLOCK_N):
                key = locate(item, head, start, axes, valid, BLOCK_N, FULL)
                k_rows = rows(k, shared(key, SHARE))
                product = similarities(q_rows, k_rows, of_q, K, BLOCK_K, PRECISION, COSINE)[0]
                score = scores(product, by_rows(scale, of_q), bias, down(query), across(key))
                weight, shrink, row_max, row_sum = fold_softmax(score, row_max, row_sum, bias)
                weight = dropped(weight, kept(dropout, heads, query, key, axes))
                values = load(rows(v, shared(key, SHARE)), chunk, V, BLOCK_V)
                acc = tl.dot(weight.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
            to = locate(item, head, anew(first, chunk, 2), axes, valid, BLOCK_M)
        store(rows(out, to), chunk, acc / divisor(row_sum), V, BLOCK_V)

    if lse is not None:
        tl.store(rows(lse, query).pointer, log_sum_exp(row_max, row_sum, bias), query.inside)


@triton.jit
def forward_group_kernel(
    q, k, v, bias, scales, valid, dropout, out, lse, scale, heads, items, slots, maps, axes,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FULL: tl.constexpr, SHARE: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same for groups that fit in one block: a bias stays on chip, and the next group comes while one is computed.

    A program takes one head of every `slots`-th of the items, the groups of all maps: grid (slots * heads,); or of one
    map where each has a bias: (slots * maps * heads,).
    """
    _, map_, head, first, last = items_of(1, heads, items, slots, maps)
    scale = scale_of(scale, scales, head)
    token = locate(map_ * groups_of(axes), head, 0, axes, None, BLOCK)
    bias_block = None if bias is None else load_bias(bias, down(token), across(token))  # [BLOCK, BLOCK]
    for item in tl.range(first, last, slots):
        token = locate(item, head, 0, axes, valid, BLOCK, FULL)
        q_rows, k_rows = rows(q, token), rows(k, shared(token, SHARE))
        product, of_q, _of_k = similarities(q_rows, k_rows, (), K, BLOCK_K, PRECISION, COSINE)
        score = biased(product, by_rows(scale, of_q), bias_block, across(token))
        weight, row_max = weigh(score, LOWEST, bias)
        row_sum = tl.sum(weight, 1)
        weight = dropped(weight, kept(dropout, heads, token, token, axes))
        for chunk in range(0, V, BLOCK_V):
            values = load(rows(v, shared(token, SHARE)), chunk, V, BLOCK_V)
            acc = tl.dot(weight.to(values.dtype), values, input_precision=PRECISION)
            store(rows(out, token), chunk, acc / divisor(row_sum), V, BLOCK_V)
        if lse is not None:
            tl.store(rows(lse, token).pointer, log_sum_exp(row_max, row_sum, bias), token.inside)
