# mypy: allow-untyped-defs, allow-incomplete-defs, no-check-untyped-defs
"""Attention as textbooks have it in Triton: heads one after another in memory, the softmax folded over blocks of keys.

It has nothing of our kernels in it. `tiles calibrate` reads it where others have measured such a kernel.
"""

import triton
import triton.language as tl


@triton.jit
def attend(
    q, k, v, bias, out, scale, tokens, heads,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale * q k^T + bias) v of [items, heads, tokens, WIDTH]: grid (query blocks, items * heads).

    RAGGED: tokens need not be a multiple of the blocks.
    """
    m, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    first = tl.program_id(1).to(tl.int64) * tokens * WIDTH
    rows = first + m[:, None] * WIDTH + d[None, :]
    q_block = tl.load(q + rows, m[:, None] < tokens, other=0.0) if RAGGED else tl.load(q + rows)
    row_max, row_sum = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for start in range(0, tokens, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        columns = first + n[:, None] * WIDTH + d[None, :]
        k_block = tl.load(k + columns, n[:, None] < tokens, other=0.0) if RAGGED else tl.load(k + columns)
        score = tl.dot(q_block, k_block.T) * (scale * 1.44269504)
        if bias is not None:
            table = bias + (tl.program_id(1) % heads * tokens + m[:, None]) * tokens + n[None, :]
            inside = (m[:, None] < tokens) & (n[None, :] < tokens)
            score += tl.load(table, inside, other=0.0).to(tl.float32) * 1.44269504
        if RAGGED:
            score = tl.where(n[None, :] < tokens, score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))
        weight, shrink = tl.exp2(score - new_max[:, None]), tl.exp2(row_max - new_max)
        row_max, row_sum = new_max, row_sum * shrink + tl.sum(weight, 1)
        v_block = tl.load(v + columns, n[:, None] < tokens, other=0.0) if RAGGED else tl.load(v + columns)
        acc = tl.dot(weight.to(v_block.dtype), v_block, acc * shrink[:, None])
    result = (acc / row_sum[:, None]).to(out.dtype.element_ty)
    if RAGGED:
        tl.store(out + rows, result, m[:, None] < tokens)
    else:
        tl.store(out + rows, result)
