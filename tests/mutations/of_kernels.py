"""Mistakes in the kernels and their backend."""

from tests.mutations.defect import Defect

KERNELS = "isa_triton/backend/kernels"
NAMED = "test_kernels.py::test_a_named_case_keeps_the_budget"
WINDOWS = f"{NAMED}[windows]"
KEYLESS = "test_rows_without_keys.py::test_the_same_in_kernels_of_every_form"
LIMITS = "test_kernel_limits.py::test_"
STRIDES = f"{LIMITS}strides_that_nothing_divides_are_taken"
OFFSETS = f"{LIMITS}offsets_may_exceed_31_bits"
BACKEND = "test_backend_triton.py::test_"
COSINE = "test_cosine.py::test_"

# What such kernels are known for: `tests/test_planted_defects.py` plants them too.
KNOWN = (
    Defect(
        "mask off by one", f"{KERNELS}/common.py", "(number < tokens_of(axes)", "(number <= tokens_of(axes)", WINDOWS
    ),
    Defect(
        "h and w exchanged", "isa_triton/partition.py", "token // axes[-1].tokens", "token // axes[0].tokens", WINDOWS
    ),
    Defect(
        "stride of the wrong tensor",
        f"{KERNELS}/plan.py",
        "zip(names, layouts, strict=True)",
        "zip(names, (*layouts[:2], layouts[1], *layouts[3:]), strict=True)",
        f"{NAMED}[values of one channel]",
    ),
    Defect(
        "masked columns not zeroed",
        f"{KERNELS}/common.py",
        'tl.where(key.inside, score, float("-inf"))',
        "score",
        WINDOWS,
    ),
    Defect(
        "int32 offset",
        f"{KERNELS}/common.py",
        "tokens.pixel[0].to(tl.int64) * pixels.axes[0]",
        "tokens.pixel[0] * pixels.axes[0]",
        "test_kernel_limits.py::test_offsets_may_exceed_31_bits[row-one block]",
    ),
    Defect("wrong lse", f"{KERNELS}/common.py", "row_max * (1.0 / unit(bias))", "row_max", WINDOWS),
    Defect(
        "bias transposed",
        f"{KERNELS}/common.py",
        "query.number.to(tl.int64) * numbers.query\n    column = key.number",
        "key.number.to(tl.int64) * numbers.query\n    column = query.number",
        f"{NAMED}[a bias]",
    ),
    Defect(
        "dv from unnormalised p",
        f"{KERNELS}/backward.py",
        "dropped(p, factors).to(do_chunk",
        "dropped(weight, factors).to(do_chunk",
        WINDOWS,
    ),
    Defect(
        "tail group skipped",
        f"{KERNELS}/plan.py",
        "items = maps * partition.groups\n    if",
        "items = maps * (partition.groups - 1)\n    if",
        WINDOWS,
    ),
    Defect(
        "delta of the wrong row",
        f"{KERNELS}/backward.py",
        "(dp - delta[:, None])",
        "(dp - delta[None, :])",
        WINDOWS,
    ),
    Defect(
        "old sum not shrunk",
        f"{KERNELS}/common.py",
        "row_sum * shrink",
        "row_sum",
        f"{NAMED}[windows of many blocks]",
    ),
    Defect(
        "halves exchanged",
        f"{KERNELS}/backward.py",
        "low | (high << 16)",
        "high | (low << 16)",
        f"{NAMED}[wide heads]",
    ),
    Defect(
        "pixels before the map",
        "isa_triton/axis.py",
        "inside & (pixel >= 0)",
        "inside",
        f"{NAMED}[shifted windows]",
    ),
    Defect(
        "nothing divided by nothing",
        f"{KERNELS}/common.py",
        "tl.maximum(row_sum, 1.0, propagate_nan=tl.PropagateNan.ALL)[:, None]",
        "row_sum[:, None]",
        f"{KEYLESS}[torch.float32-one block]",
    ),
    Defect(
        "lse of minus infinity subtracted",
        f"{KERNELS}/backward.py",
        'tl.where(lse_m == float("-inf"), float("inf"), lse_m)',
        "lse_m",
        f"{KEYLESS}[torch.float32-many blocks]",
    ),
    Defect(
        "scores in another unit than their exponentials",
        f"{KERNELS}/common.py",
        "LOG2_E if bias is None else LOG2_E / 2",
        "LOG2_E",
        f"{NAMED}[a bias]",
    ),
    Defect(
        "p beyond 1",
        f"{KERNELS}/backward.py",
        "tl.exp2(exponent) if bias is None else at_most_one(exponent, bias)",
        "exp(exponent, bias)",
        "test_rows_without_keys.py::test_scores_that_rounding_moves_by_hundreds_give_finite_gradients[many blocks]",
    ),
    Defect("dlse forgotten", f"{KERNELS}/backward.py", "delta -= one_each", "delta -= 0 * one_each", WINDOWS),
)

OTHERS = (
    # -- kernels, planned
    Defect(
        "no slot for more heads than partial sums, forward",
        f"{KERNELS}/plan.py",
        "max(1, IN_TURNS // max(1, others))",
        "IN_TURNS // max(1, others)",
        f"{LIMITS}more_heads_than_partial_sums_have_one_each[one block-True]",
    ),
    Defect(
        "no slot for more heads than partial sums, backward",
        f"{KERNELS}/plan.py",
        "max(1, IN_TURNS // max(1, others))",
        "IN_TURNS // max(1, others)",
        f"{LIMITS}more_heads_than_partial_sums_have_one_each[many blocks-True]",
    ),
    Defect(
        "a block that fits exactly is many, forward",
        f"{KERNELS}/plan.py",
        '"ONE_BLOCK": partition.tokens <= tile.block_n',
        '"ONE_BLOCK": partition.tokens < tile.block_n',
        f"{LIMITS}a_group_as_large_as_its_block_is_loaded_as_if_it_were_smaller",
    ),
    Defect(
        "a block that fits exactly is many, queries",
        f"{KERNELS}/plan.py",
        '"ONE_BLOCK": tokens <= tile.block_n',
        '"ONE_BLOCK": tokens < tile.block_n',
        f"{LIMITS}a_group_as_large_as_its_block_is_loaded_as_if_it_were_smaller",
    ),
    Defect(
        "a block that fits exactly is many, keys",
        f"{KERNELS}/plan.py",
        '"ONE_BLOCK": tokens <= tile.block_m',
        '"ONE_BLOCK": tokens < tile.block_m',
        f"{LIMITS}a_group_as_large_as_its_block_is_loaded_as_if_it_were_smaller",
    ),
    Defect(
        "the unit of strides without the batch",
        f"{KERNELS}/plan.py",
        "_unit(reduce(or_, (batch, *of_axes, head)),",
        "_unit(reduce(or_, (*of_axes, head)),",
        f"{STRIDES}[batch-one block]",
    ),
    Defect(
        "the unit of strides without the heads",
        f"{KERNELS}/plan.py",
        "_unit(reduce(or_, (batch, *of_axes, head)),",
        "_unit(reduce(or_, (batch, *of_axes)),",
        f"{STRIDES}[head-one block]",
    ),
    Defect(
        "the unit of a padded bias without its tokens",
        f"{KERNELS}/plan.py",
        "_unit(batch | head | query | tokens,",
        "_unit(batch | head | query,",
        f"{STRIDES}[bias-one block]",
    ),
    Defect(
        "the longest group of one kernel is one shorter",
        f"{KERNELS}/plan.py",
        "partition.tokens <= tiles.group.block_m",
        "partition.tokens < tiles.group.block_m",
        f"{BACKEND}what_is_kept_is_what_the_tiles_need[32-sm_90]",
    ),
    # -- kernels
    Defect(
        "int32 offset of the batch",
        f"{KERNELS}/common.py",
        "tokens.batch.to(tl.int64) * pixels.batch",
        "tokens.batch * pixels.batch",
        f"{OFFSETS}[batch-one block]",
    ),
    Defect(
        "int32 offset of the head",
        f"{KERNELS}/common.py",
        "tokens.head.to(tl.int64) * pixels.head",
        "tokens.head * pixels.head",
        f"{OFFSETS}[head-one block]",
    ),
    Defect(
        "int32 offset of the channel",
        f"{KERNELS}/common.py",
        "channel.to(tl.int64)[None, :] * rows.channel",
        "channel[None, :] * rows.channel",
        f"{OFFSETS}[channel-one block]",
    ),
    Defect(
        "no scale",
        f"{KERNELS}/common.py",
        "product * (scale * unit(bias_block))",
        "product * unit(bias_block)",
        WINDOWS,
    ),
    Defect(
        "an infinite exponential, doubled",
        f"{KERNELS}/common.py",
        "tl.maximum(row_max - new_max, LOWEST / 2)",
        "row_max - new_max",
        "test_rows_without_keys.py::test_finite_biases_give_finite_numbers_in_kernels_of_every_form"
        "[torch.float32-many blocks]",
        "exp2 of what is below every exponent is 0, as exp2 of minus infinity is: the code says which, for either",
    ),
    Defect(
        "stores beyond the width",
        f"{KERNELS}/common.py",
        "tl.store(pointer, values.to(rows.pointer.dtype.element_ty), exists)",
        "tl.store(pointer, values.to(rows.pointer.dtype.element_ty), rows.inside[:, None])",
        f"{NAMED}[values of one channel]",
    ),
    Defect(
        "what is outside is one",
        f"{KERNELS}/common.py",
        "pointer, exists = cells(rows, start, WIDTH, BLOCK)\n    return tl.load(pointer, exists, other=0.0)",
        "pointer, exists = cells(rows, start, WIDTH, BLOCK)\n    return tl.load(pointer, exists, other=1.0)",
        f"{NAMED}[values of one channel]",
    ),
    Defect(
        "heads exchanged with blocks",
        f"{KERNELS}/common.py",
        "program // blocks % heads",
        "program % heads",
        f"{STRIDES}[batch-many blocks]",
    ),
    Defect(
        "sums over keys in halves",
        f"{KERNELS}/forward.py",
        "values, acc * shrink[:, None], input",
        "values, (acc * shrink[:, None]).to(tl.float16).to(tl.float32), input",
        "test_numerics.py::test_long_groups_keep_the_budget[dtype1-triton-320]",
    ),
    Defect(
        "a program skips items",
        f"{KERNELS}/forward.py",
        "tl.range(first, last, slots)",
        "tl.range(first, last, slots + 1)",
        f"{LIMITS}more_heads_than_partial_sums_have_one_each[one block-True]",
    ),
    Defect(
        "sums of dbias in halves",
        f"{KERNELS}/backward.py",
        "            ds_sum += ds\n",
        "            ds_sum = (ds_sum + ds).to(tl.float16).to(tl.float32)\n",
        "test_numerics.py::test_a_bias_gradient_over_many_groups_keeps_the_budget[dtype1-triton-10]",
    ),
    Defect(
        "dk without the scale, one block",
        f"{KERNELS}/backward.py",
        "store(rows(dk, token), chunk, dk_chunk * factor, K, BLOCK_K)",
        "store(rows(dk, token), chunk, dk_chunk, K, BLOCK_K)",
        WINDOWS,
    ),
    Defect(
        "dq without the scale, many blocks",
        f"{KERNELS}/backward.py",
        "store(rows(dq, to), 0, acc * scale, K, WIDTH_K)",
        "store(rows(dq, to), 0, acc, K, WIDTH_K)",
        f"{NAMED}[windows of many blocks]",
    ),
    Defect(
        "rows found again are those of the first queries",
        f"{KERNELS}/forward.py",
        "anew(first, chunk, 2)",
        "anew(0, chunk, 2)",
        f"{NAMED}[windows of many blocks]",
    ),
    Defect(
        "rows found again are those of the first keys",
        f"{KERNELS}/backward.py",
        "anew(first, 0, 1), axes, valid, BLOCK_N",
        "anew(0, 0, 1), axes, valid, BLOCK_N",
        f"{NAMED}[windows of many blocks]",
    ),
    Defect(
        "delta of queries outside the map is written",
        f"{KERNELS}/backward.py",
        "tl.store(rows(delta, query).pointer, delta_m, query.inside)\n\n    if ONE",
        "tl.store(rows(delta, query).pointer, delta_m)\n\n    if ONE",
        f"{NAMED}[windows of many blocks]",
    ),
    # -- the backend of the kernels
    Defect(
        "partial sums in halves",
        "isa_triton/backend/triton.py",
        "partials = q.new_empty(shape, dtype=torch.float32)",
        "partials = q.new_empty(shape)",
        "test_numerics.py::test_sums_of_dbias_may_be_beyond_halves_on_their_way[triton]",
    ),
    Defect(
        "backward in another precision",
        "isa_triton/backend/triton.py",
        "chosen,\n            precision, call.dropout_p",
        'chosen,\n            "ieee", call.dropout_p',
        f"{BACKEND}both_passes_multiply_with_the_same_precision",
    ),
    # -- cosines
    Defect(
        "squares summed in halves",
        f"{KERNELS}/common.py",
        "wide = chunk.to(tl.float32)",
        "wide = chunk",
        f"{COSINE}only_directions_matter[torch.float16-triton]",
    ),
    Defect(
        "zeros divided by their length",
        f"{KERNELS}/common.py",
        "tl.rsqrt(tl.maximum(squares, 1e-24))",
        "tl.rsqrt(squares)",
        f"{COSINE}a_vector_of_zeros_is_like_every_other[torch.float32-triton]",
    ),
    Defect(
        "lengths of the last chunk of keys",
        f"{KERNELS}/common.py",
        "b_squares += sums",
        "b_squares = sums",
        f"{COSINE}lengths_are_those_of_all_chunks_of_the_width[32]",
    ),
    Defect(
        "lengths of the last chunk of queries, block by block",
        f"{KERNELS}/common.py",
        "            squares += sums",
        "            squares = sums",
        f"{COSINE}lengths_are_those_of_all_chunks_of_the_width[16]",
    ),
    Defect(
        "dq of keys with their lengths",
        f"{KERNELS}/backward.py",
        "k_chunk = normalised(load(k_rows, chunk, K, BLOCK_K), of_k)",
        "k_chunk = load(k_rows, chunk, K, BLOCK_K)",
        f"{COSINE}every_kernel_has_cosines[whole groups]",
    ),
    Defect(
        "dq that changes lengths",
        "isa_triton/backend/cosine.py",
        "found = g - x * (along.masked_fill(length < SHORTEST, 0) * inverse)",
        "found = g.clone()",
        f"{COSINE}every_kernel_has_cosines[whole groups]",
    ),
    Defect(
        "the gradient of scales by what invalid pixels hold",
        "isa_triton/backend/triton.py",
        "if hidden and (call",
        "if False and (call",
        "test_door.py::test_what_pixels_that_are_not_valid_hold_is_no_matter[triton-scales]",
    ),
    Defect(
        "sums of dk in halves",
        "isa_triton/backend/triton.py",
        "x.shape[-1], dtype=wide)",
        "x.shape[-1])",
        "test_numerics.py::test_sums_of_dk_may_be_beyond_halves_on_their_way[triton]",
    ),
    Defect(
        "extra keys with their lengths",
        "isa_triton/functional.py",
        "q, k = normalised(q), normalised(k)",
        "q = normalised(q)",
        f"{COSINE}dropout_is_of_the_same_weights",
    ),
    # -- dropout
    Defect(
        "kept weights of the transposed mask",
        "isa_triton/backend/kernels/common.py",
        "        if TRANSPOSED:\n            drawn = draw(start[None, :], step[None, :], key_pixel[:, None])",
        "        if TRANSPOSED:\n            drawn = draw(start[:, None], step[:, None], key_pixel[None, :])",
        "test_dropout.py::test_every_kernel_drops_what_the_mask_says[whole groups]",
    ),
    Defect(
        "heads of a call counted on",
        "isa_triton/backend/kernels/common.py",
        "(query.head % of_call).to",
        "query.head.to",
        "test_dropout.py::test_vmap_is_one_call_after_another[triton]",
    ),
    Defect(
        "dropout of dP left out",
        "isa_triton/backend/kernels/backward.py",
        "        dp = dropped(dp, factors)\n        delta",
        "        delta",
        "test_dropout.py::test_every_kernel_drops_what_the_mask_says[one block]",
    ),
    Defect(
        "the first packed pixel is none",
        "isa_triton/backend/kernels/common.py",
        "        return (pixel,), pixel >= 0\n",
        "        return (pixel,), pixel > 0\n",
        "test_partition_batch.py::test_every_kernel_reads_the_table[one block]",
    ),
    Defect(
        "dlse as it lies, and not negated",
        "isa_triton/backend/triton.py",
        "do, dlse, key_heads = _in_memory(do), _in_memory(dlse),",
        "do, dlse, key_heads = _in_memory(do), dlse,",
        "test_numerics.py::test_a_lazy_negation_is_a_negation[triton]",
    ),
    Defect(
        "the architecture of device 0",
        "isa_triton/backend/triton.py",
        "torch.cuda.get_device_properties(device)",
        "torch.cuda.get_device_properties(torch.device(device.type, 0))",
        f"{BACKEND}what_runs_for_a_tensor_runs_on_its_device",
    ),
    Defect(
        "a launch on device 0",
        "isa_triton/backend/triton.py",
        "torch.accelerator.device_index(device.index)",
        "torch.accelerator.device_index(0)",
        f"{BACKEND}what_runs_for_a_tensor_runs_on_its_device",
    ),
    Defect(
        "out is kept for one group too many",
        "isa_triton/backend/triton.py",
        "return partition.tokens > _longest_group(",
        "return partition.tokens >= _longest_group(",
        f"{BACKEND}what_is_kept_is_what_the_tiles_need[32-sm_90]",
    ),
    Defect(
        "never tf32",
        "isa_triton/backend/triton.py",
        'return "tf32" if allowed and',
        'return "ieee" if allowed and',
        f"{BACKEND}fp32_products_follow_torchs_matmul_precision",
    ),
)
