# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""The backward kernels, from one derivation.

For a query i and a key j of one group, with the gradients do of out and dlse of lse:

    s_ij  = scale * q_i . k_j + bias_ij       p_ij = exp(s_ij - lse_i)        out_i = sum_j p_ij v_j
    dv_j  = sum_i p_ij do_i                   dp_ij = do_i . v_j
    ds_ij = p_ij (dp_ij - delta_i)            delta_i = sum_j p_ij dp_ij - dlse_i = do_i . out_i - dlse_i
    dq_i  = scale * sum_j ds_ij k_j           dk_j = scale * sum_i ds_ij q_i
    dbias_ij = sum of ds_ij over maps and groups, or over the groups of its map

With dropout, whose factors z_ij are 0 or 1 / (1 - dropout_p), out_i and dv_j have z_ij p_ij for p_ij, and dp_ij is
z_ij do_i . v_j.

Where heads have a `scale` each, a tensor, dq is left without it: the caller needs it so for the gradient of the scales.

With cosines q and k stand for vectors of length 1 above: products have a factor a row and one a column, chunks that ds
is multiplied by are normalised, and dq and dk are those of such vectors: the caller makes those of q and k of them.

dlse enters through delta, for d lse_i / d s_ij = p_ij. A group that fits in one block has all its p and dp on chip: one
kernel forms the five products, takes delta from the first form, and needs neither out nor lse. Longer groups go in
passes that each own the rows they write: queries (dq, delta), keys (dk, dv) and pairs (dbias).

Where all keys of a group fit in a block beside some of its queries, a program of the first pass has whole rows of p and
dp, one of the second whole columns: delta has the first form still, and gradients are formed and written chunk by chunk
of their width, so that the registers are there for scores. Of longer groups p and dp come block by block: delta has the
second form, and gradients are summed over the blocks. Nothing is added atomically: dbias is summed in registers by a
fixed number of programs, and the caller adds their sums.
"""

import triton
import triton.language as tl

from isa_triton.backend.kernels.common import (
    LOWEST,
    across,
    anew,
    anywhere,
    by_columns,
    by_rows,
    divisor,
    down,
    dropped,
    exp,
    inner_products,
    inverse_lengths,
    items_of,
    kept,
    lengths_inverted,
    load,
    locate,
    normalised,
    pairs,
    rows,
    scale_of,
    scores,
    shared,
    similarities,
    store,
    sums_of_squares,
    tokens_of,
    unit,
    unravel,
    weigh,
)


@triton.jit
def one_each(pixels, tokens, OUTSIDE: tl.constexpr):
    """One number a token, from lse, dlse or delta."""
    return tl.load(rows(pixels, tokens).pointer, tokens.inside, other=OUTSIDE)


@triton.jit
def store_sum(partials, index, query, key, values):
    """A program's share of dbias, into partials[index] of [slots * heads, tokens, tokens]."""
    pointer, exists = pairs(partials, index.to(tl.int64) * partials.head, query, key)
    tl.store(pointer, values, exists)


@triton.jit
def backward_group_kernel(
    q, k, v, bias, scales, valid, dropout, do, dlse, dq, dk, dv, partials, scale, heads, items, slots, maps, axes,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FULL: tl.constexpr, SHARE: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every gradient of groups that fit in one block, from q, k, v and bias alone.

    A program takes one head of every `slots`-th of the items, the groups of all maps: grid (slots * heads,).
    """
    _, _, head, first, last = items_of(1, heads, items, slots, maps)
    factor = scale_of(scale, scales, head)
    ds_sum = tl.zeros([BLOCK, BLOCK], tl.float32)
    # The next item comes while one is computed; to hoist what items share takes more registers than there are.
    for item in tl.range(first, last, slots, disable_licm=True):
        token = locate(item, head, 0, axes, valid, BLOCK, FULL)
        q_rows, do_rows, as_key = rows(q, token), rows(do, token), shared(token, SHARE)
        k_rows, v_rows = rows(k, as_key), rows(v, as_key)
        product, of_q, of_k = similarities(q_rows, k_rows, (), K, BLOCK_K, PRECISION, COSINE)
        score = scores(product, by_rows(factor, of_q), bias, down(token), across(token))  # [BLOCK, BLOCK]
        weight = weigh(score, LOWEST, bias)[0]
        p = weight / divisor(tl.sum(weight, 1))  # a query outside the map has one too, but its do is zero
        factors = kept(dropout, heads, token, token, axes)

        dp = tl.zeros([BLOCK, BLOCK], tl.float32)
        for chunk in range(0, V, BLOCK_V):
            do_chunk, v_chunk = load(do_rows, chunk, V, BLOCK_V), load(v_rows, chunk, V, BLOCK_V)
            dp = tl.dot(do_chunk, v_chunk.T, dp, input_precision=PRECISION)
            dv_chunk = tl.dot(dropped(p, factors).to(do_chunk.dtype).T, do_chunk, input_precision=PRECISION)
            store(rows(dv, token), chunk, dv_chunk, V, BLOCK_V)

        dp = dropped(dp, factors)
        delta = tl.sum(p * dp, 1)
        if dlse is not None:
            delta -= one_each(dlse, token, 0.0)
        ds = p * (dp - delta[:, None])
        if partials is not None:
            ds_sum += ds
        for chunk in range(0, K, BLOCK_K):
            q_chunk, k_chunk = load(q_rows, chunk, K, BLOCK_K), load(k_rows, chunk, K, BLOCK_K)
            q_chunk, k_chunk = normalised(q_chunk, of_q), normalised(k_chunk, of_k)
            dq_chunk = tl.dot(ds.to(k_chunk.dtype), k_chunk, input_precision=PRECISION)
            dk_chunk = tl.dot(ds.to(q_chunk.dtype).T, q_chunk, input_precision=PRECISION)
            store(rows(dq, token), chunk, dq_chunk * scale, K, BLOCK_K)
            store(rows(dk, token), chunk, dk_chunk * factor, K, BLOCK_K)

    if partials is not None:
        token = locate(0, 0, 0, axes, None, BLOCK)
        store_sum(partials, tl.program_id(0), down(token), across(token), ds_sum)


@triton.jit
def load_lse(lse, query, bias):
    """lse of queries whose p is to be zero as infinity: of those outside the map, or without keys by their bias."""
    lse_m = one_each(lse, query, float("inf"))
    return lse_m if bias is None else tl.where(lse_m == float("-inf"), float("inf"), lse_m)


@triton.jit
def probabilities(product, scale, bias, lse, query, key):
    """p, or p^T, from q k^T and the saved lse; zero for tokens outside the map, where a query has lse = infinity."""
    exponent = scores(product, scale, bias, query, key) - lse * unit(bias)
    return tl.exp2(exponent) if bias is None else at_most_one(exponent, bias)


@triton.jit
def finite_probabilities(product, scale, bias, lse, query, key):
    """`probabilities`, but for keys outside the map something between 0 and 1; their rows of k and v are zero."""
    return at_most_one(scores(product, scale, bias, query, anywhere(key)) - lse * unit(bias), bias)


@triton.jit
def at_most_one(exponent, bias):
    """exp of what can be above zero: for keys outside the map, or by rounding, which a large bias makes large."""
    return exp(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL), bias)


@triton.jit
def pack(x):
    """16-bit numbers [M, N], two to an integer [M, N / 2]: a register each is what compilers would give them.

    They would also undo this, could they look past the branch, which is always taken: grids have one axis.
    """
    if x.dtype.primitive_bitwidth == 16:
        bits = tl.reshape(x.to(tl.uint16, bitcast=True), [x.shape[0], x.shape[1] // 2, 2])
        low, high = tl.split(bits.to(tl.uint32))
        x = tl.zeros_like(low)
        if tl.program_id(1) == 0:
            x = low | (high << 16)
    return x


@triton.jit
def unpack(x, dtype, TIME: tl.constexpr):
    """What was packed. To compilers a second TIME (1 or 2) is another: they would keep what the first had unpacked."""
    if dtype.primitive_bitwidth == 16:
        half = 16 + tl.program_id(TIME)
        low, high = (x << half) >> 16, x >> half
        x = tl.reshape(tl.join(low, high), [x.shape[0], x.shape[1] * 2]).to(tl.uint16).to(dtype, bitcast=True)
    return x


@triton.jit
def backward_queries_kernel(
    q, k, v, bias, scales, valid, dropout, out, lse, do, dlse, dq, delta, scale, heads, axes,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WIDTH_K: tl.constexpr, SHARE: tl.constexpr, COSINE: tl.constexpr, ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta for the passes that follow. A program takes BLOCK_M queries, as in forward."""
    tokens = tokens_of(axes)
    block, head, item = unravel(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), heads)
    first = block * BLOCK_M
    query = locate(item, head, first, axes, valid, BLOCK_M)
    q_rows, do_rows = rows(q, query), rows(do, query)
    dtype: tl.constexpr = q.data.dtype.element_ty
    factor = scale_of(scale, scales, head)
    lse_m = load_lse(lse, query, bias)

    if ONE_BLOCK:
        key = locate(item, head, 0, axes, valid, BLOCK_N)
        k_rows, v_rows = rows(k, shared(key, SHARE)), rows(v, shared(key, SHARE))
        product, of_q, of_k = similarities(q_rows, k_rows, (), K, BLOCK_K, PRECISION, COSINE)
        factor = by_rows(factor, of_q)
        p = finite_probabilities(product, factor, bias, lse_m[:, None], down(query), across(key))  # [BLOCK_M, BLOCK_N]
        packed = pack(p.to(dtype))
        dp = inner_products(do_rows, v_rows, V, BLOCK_V, PRECISION)
        dp = dropped(dp, kept(dropout, heads, query, key, axes))
        delta_m = tl.sum(unpack(packed, dtype, 1) * dp, 1)
    else:
        delta_m = tl.zeros([BLOCK_M], tl.float32)
        for chunk in range(0, V, BLOCK_V):
            do_chunk, out_chunk = load(do_rows, chunk, V, BLOCK_V), load(rows(out, query), chunk, V, BLOCK_V)
            delta_m += tl.sum(do_chunk.to(tl.float32) * out_chunk.to(tl.float32), 1)
    if dlse is not None:
        delta_m -= one_each(dlse, query, 0.0)
    tl.store(rows(delta, query).pointer, delta_m, query.inside)

    if ONE_BLOCK:
        ds = (unpack(packed, dtype, 2) * (dp - delta_m[:, None])).to(dtype)
        for chunk in range(0, K, BLOCK_K):
            k_chunk = normalised(load(k_rows, chunk, K, BLOCK_K), of_k)
            dq_chunk = tl.dot(ds, k_chunk, input_precision=PRECISION)
            store(rows(dq, query), chunk, dq_chunk * scale, K, BLOCK_K)
    else:
        acc = tl.zeros([BLOCK_M, WIDTH_K], tl.float32)
        of_q = lengths_inverted(q_rows, K, BLOCK_K, COSINE)
        for start in range(0, tokens, BLOCK_N):
            key = locate(item, head, start, axes, valid, BLOCK_N)
            k_rows, v_rows = rows(k, shared(key, SHARE)), rows(v, shared(key, SHARE))
            product, _, of_k = similarities(q_rows, k_rows, of_q, K, BLOCK_K, PRECISION, COSINE)
            p = finite_probabilities(product, by_rows(factor, of_q), bias, lse_m[:, None], down(query), across(key))
            dp = inner_products(do_rows, v_rows, V, BLOCK_V, PRECISION)
            ds = p * (dropped(dp, kept(dropout, heads, query, key, axes)) - delta_m[:, None])
            keys = normalised(load(k_rows, 0, K, WIDTH_K), of_k)
            acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
        to = locate(item, head, anew(first, 0, 1), axes, valid, BLOCK_M)
        store(rows(dq, to), 0, acc * scale, K, WIDTH_K)


@triton.jit
def backward_keys_kernel(
    q, k, v, bias, scales, valid, dropout, lse, delta, do, dk, dv, scale, heads, axes,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, FULL: tl.constexpr, SHARE: tl.constexpr, COSINE: tl.constexpr,
    ONE_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv, or the one of them that is not None. A program takes BLOCK_N keys; its p and ds are transposed."""
    tokens = tokens_of(axes)
    block, head, item = unravel(tl.program_id(0), tl.cdiv(tokens, BLOCK_N), heads)
    first = block * BLOCK_N
    key = locate(item, head, first, axes, valid, BLOCK_N, FULL)
    k_rows, v_rows = rows(k, shared(key, SHARE)), rows(v, shared(key, SHARE))
    dtype: tl.constexpr = q.data.dtype.element_ty
    factor = scale_of(scale, scales, head)

    if ONE_BLOCK:
        query = locate(item, head, 0, axes, valid, BLOCK_M)
        q_rows, do_rows = rows(q, query), rows(do, query)
        lse_m = load_lse(lse, query, bias)
        product, of_k, of_q = similarities(k_rows, q_rows, (), K, BLOCK_K, PRECISION, COSINE)
        score_factor = by_rows(factor, of_k)
        p = probabilities(product, score_factor, bias, lse_m[None, :], across(query), down(key))  # [BLOCK_N, BLOCK_M]
        packed = pack(p.to(dtype))
        factors = kept(dropout, heads, query, key, axes, True)
        if dv is not None:
            p = dropped(unpack(packed, dtype, 1), factors)
            for chunk in range(0, V, BLOCK_V):
                dv_chunk = tl.dot(p, load(do_rows, chunk, V, BLOCK_V), input_precision=PRECISION)
                store(rows(dv, key), chunk, dv_chunk, V, BLOCK_V)
        if dk is not None:
            dp = dropped(inner_products(v_rows, do_rows, V, BLOCK_V, PRECISION), factors)
            ds = (unpack(packed, dtype, 2) * (dp - one_each(delta, query, 0.0)[None, :])).to(dtype)
            for chunk in range(0, K, BLOCK_K):
                q_chunk = normalised(load(q_rows, chunk, K, BLOCK_K), of_q)
                dk_chunk = tl.dot(ds, q_chunk, input_precision=PRECISION)
                store(rows(dk, key), chunk, dk_chunk * factor, K, BLOCK_K)
    else:
        if dk is not None:
            dk_acc = tl.zeros([BLOCK_N, WIDTH_K], tl.float32)
        if dv is not None:
            dv_acc = tl.zeros([BLOCK_N, WIDTH_V], tl.float32)
        of_k = lengths_inverted(k_rows, K, BLOCK_K, COSINE)
        score_factor = by_rows(factor, of_k)
        for start in range(0, tokens, BLOCK_M):
            query = locate(item, head, start, axes, valid, BLOCK_M)
            q_rows, do_rows = rows(q, query), rows(do, query)
            lse_m = load_lse(lse, query, bias)
            product, _, of_q = similarities(k_rows, q_rows, of_k, K, BLOCK_K, PRECISION, COSINE)
            p = probabilities(
                product, score_factor, bias, lse_m[None, :], across(query), down(key)
            )  # [BLOCK_N, BLOCK_M]
            factors = kept(dropout, heads, query, key, axes, True)
            if dv is not None:
                gradients = load(do_rows, 0, V, WIDTH_V)
                dv_acc = tl.dot(dropped(p, factors).to(gradients.dtype), gradients, dv_acc, input_precision=PRECISION)
            if dk is not None:
                dp = dropped(inner_products(v_rows, do_rows, V, BLOCK_V, PRECISION), factors)
                ds = p * (dp - one_each(delta, query, 0.0)[None, :])
                queries = normalised(load(q_rows, 0, K, WIDTH_K), of_q)
                dk_acc = tl.dot(ds.to(queries.dtype), queries, dk_acc, input_precision=PRECISION)
        to = locate(item, head, anew(first, 0, 1), axes, valid, BLOCK_N)
        if dk is not None:
            store(rows(dk, to), 0, dk_acc * factor, K, WIDTH_K)
        if dv is not None:
            store(rows(dv, to), 0, dv_acc, V, WIDTH_V)


@triton.jit
def backward_pairs_kernel(
    q, k, v, bias, scales, valid, dropout, lse, delta, do, partials, scale, heads, items, slots, maps, axes,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FULL: tl.constexpr, SHARE: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums of dbias. A program takes BLOCK_M x BLOCK_N pairs in one head of every `slots`-th of the items."""
    tokens = tokens_of(axes)
    across_keys = tl.cdiv(tokens, BLOCK_N)
    blocks = tl.cdiv(tokens, BLOCK_M) * across_keys
    block, _, head, first, last = items_of(blocks, heads, items, slots, maps)
    factor = scale_of(scale, scales, head)
    query_start, key_start = block // across_keys * BLOCK_M, block % across_keys * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for item in tl.range(first, last, slots, disable_licm=True):
        query = locate(item, head, query_start, axes, valid, BLOCK_M)
        key = locate(item, head, key_start, axes, valid, BLOCK_N, FULL)
        lse_m, delta_m = load_lse(lse, query, bias), one_each(delta, query, 0.0)
        q_rows, k_rows = rows(q, query), rows(k, shared(key, SHARE))
        product, of_q, _of_k = similarities(q_rows, k_rows, (), K, BLOCK_K, PRECISION, COSINE)
        p = probabilities(product, by_rows(factor, of_q), bias, lse_m[:, None], down(query), across(key))
        dp = inner_products(rows(do, query), rows(v, shared(key, SHARE)), V, BLOCK_V, PRECISION)
        acc += p * (dropped(dp, kept(dropout, heads, query, key, axes)) - delta_m[:, None])
    query, key = locate(0, 0, query_start, axes, None, BLOCK_M), locate(0, 0, key_start, axes, None, BLOCK_N)
    store_sum(partials, tl.program_id(0) // blocks, down(query), across(key), acc)


@triton.jit
def backward_columns_kernel(
    q, k, v, bias, scales, valid, dropout, out, lse, do, dlse, dq, dk, dv, delta, scale, heads, axes,
    K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    FULL: tl.constexpr, SHARE: tl.constexpr, COSINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv at once, of groups whose queries fit in one block with all of their width, but whose scores do not.

    A program takes one head of a group: grid (maps * groups * heads,). q and do stay on chip; keys come block by block,
    each with its columns of p and ds, and dq is summed over them. Every tensor is read once.
    """
    _, head, item = unravel(tl.program_id(0), 1, heads)
    dtype: tl.constexpr = q.data.dtype.element_ty
    factor = scale_of(scale, scales, head)
    query = locate(item, head, 0, axes, valid, BLOCK_M)
    queries, gradients = load(rows(q, query), 0, K, BLOCK_K), load(rows(do, query), 0, V, BLOCK_V)
    of_q = inverse_lengths(sums_of_squares(queries)) if COSINE else ()
    lse_m = load_lse(lse, query, bias)
    outputs = load(rows(out, query), 0, V, BLOCK_V)
    delta_m = tl.sum(gradients.to(tl.float32) * outputs.to(tl.float32), 1)
    if dlse is not None:
        delta_m -= one_each(dlse, query, 0.0)
    if delta is not None:
        tl.store(rows(delta, query).pointer, delta_m, query.inside)

    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in tl.range(0, tokens_of(axes), BLOCK_N, disable_licm=True):
        key = locate(item, head, start, axes, valid, BLOCK_N, FULL)
        as_key = shared(key, SHARE)
        keys, values = load(rows(k, as_key), 0, K, BLOCK_K), load(rows(v, as_key), 0, V, BLOCK_V)
        of_k = inverse_lengths(sums_of_squares(keys)) if COSINE else ()
        product = by_columns(tl.dot(queries, keys.T, input_precision=PRECISION), of_k)
        score_factor = by_rows(factor, of_q)
        p = probabilities(product, score_factor, bias, lse_m[:, None], down(query), across(key))  # [BLOCK_M, BLOCK_N]
        packed, factors = pack(p.to(dtype)), kept(dropout, heads, query, key, axes)
        dv_block = tl.dot(dropped(unpack(packed, dtype, 1), factors).T, gradients, input_precision=PRECISION)
        store(rows(dv, key), 0, dv_block, V, BLOCK_V)
        dp = dropped(tl.dot(gradients, values.T, input_precision=PRECISION), factors)
        ds = (unpack(packed, dtype, 2) * (dp - delta_m[:, None])).to(dtype)
        dk_block = tl.dot(ds.T, normalised(queries, of_q), input_precision=PRECISION)
        store(rows(dk, key), 0, dk_block * factor, K, BLOCK_K)
        acc = tl.dot(ds, normalised(keys, of_k), acc, input_precision=PRECISION)
    store(rows(dq, locate(item, head, anew(0, 0, 1), axes, valid, BLOCK_M)), 0, acc * scale, K, BLOCK_K)
