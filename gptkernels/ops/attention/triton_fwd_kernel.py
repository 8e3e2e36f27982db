"""The forward kernel: one program per tile of queries of one head, softmax in base 2 while the keys pass by."""

import triton
import triton.language as tl

from ..triton_dropout import counted_from, kept
from .triton_blocks import (
    LN2,
    LOG2E,
    UNSPECIALIZED,
    add_weighted,
    bent,
    inner_products,
    key_blocks,
    load_head,
    load_tile,
    locate,
    rows_of,
    sees,
    store_head,
    tile_and_head,
    zeros_head,
)


@triton.jit
def attend_block(
    sum1,  # (BLOCK_M, D1) float32: weighted values so far, of the head's first part
    sum2,  # (BLOCK_M, D2)
    peak,  # (BLOCK_M,) largest score so far, in base 2
    total,  # (BLOCK_M,) sum of weights so far, relative to the peak
    q1,  # (BLOCK_M, D1)
    q2,  # (BLOCK_M, D2)
    k_head,  # (keys, D), as load_head takes it
    v_head,
    seed_ptr,  # (1,) int64
    block,
    position,  # (BLOCK_M,)
    low,
    keys,
    band,
    scale,
    softcap,
    slope,
    dropout_row,  # (BLOCK_M,) int64
    dropout_column,
    drop_below,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BOUNDARY: tl.constexpr,  # some query may not see some key
    CLEAN: tl.constexpr,  # take values that are NaN or Inf as zeros
    TMA: tl.constexpr,
):
    first = block * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)
    k1, k2 = load_head(k_head, first, low, keys, D, D1, D2, BLOCK_N, BOUNDARY, TMA)
    scores = inner_products(q1, q2, k1, k2, D2)
    if SOFTCAP or ALIBI:
        precise: tl.constexpr = q1.dtype == tl.float32
        scores, _ = bent(scores, position[:, None], key[None, :], scale, softcap, slope, SOFTCAP, ALIBI, precise)
        scale = 1.0
    if BOUNDARY:
        seen = sees(position[:, None], key[None, :], low, keys, band, CAUSAL, LEFT, RIGHT)
        scores = tl.where(seen, scores, -float("inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    shift = new_peak
    if BOUNDARY:
        # Rows that have seen no key yet: -inf - -inf would be NaN.
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weights = tl.exp2(scores * scale - shift[:, None])
    correction = tl.exp2(peak - shift)
    total = total * correction + tl.sum(weights, 1)
    if HAS_DROPOUT:
        weights = tl.where(
            kept(seed_ptr, dropout_row[:, None], dropout_column + key[None, :], drop_below), weights, 0.0
        )
    v1, v2 = load_head(v_head, first, low, keys, D, D1, D2, BLOCK_N, BOUNDARY, TMA)
    if CLEAN:
        v1 = tl.where(v1 * 0.0 == 0.0, v1, 0.0).to(v1.dtype)
        v2 = tl.where(v2 * 0.0 == 0.0, v2, 0.0).to(v2.dtype)
    sum1 = sum1 * correction[:, None]
    if D2 > 0:
        sum2 = sum2 * correction[:, None]
    sum1, sum2 = add_weighted(sum1, sum2, weights, v1, v2, D2)
    return sum1, sum2, new_peak, total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_fwd_kernel(
    q_ptr,  # (B, H, Tq, D) or packed (T, H, D), last dimension contiguous, as all others
    k_ptr,  # (B, Hkv, Tk, D) or (T, Hkv, D)
    v_ptr,  # as k
    k_tma,  # descriptors of both parts of (B, Hkv, Tk, D) or (1, Hkv, T, D), or None
    v_tma,
    out_ptr,  # as q
    lse_ptr,  # (B, H, Tq) or (H, T) float32
    sinks_ptr,  # (H,) or unused
    key_start_ptr,  # (B,) int32 or unused
    cu_seqlens_ptr,  # (N + 1,) int32 or unused
    cu_seqlens_k_ptr,  # (N + 1,) int32 or unused
    slopes_ptr,  # (H,) or (B or N, H) float32 or unused
    seed_ptr,  # (1,) int64 or unused
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    v_stride_b,
    v_stride_h,
    v_stride_t,
    out_stride_b,
    out_stride_h,
    out_stride_t,
    tiles,
    batch_heads,
    section,
    heads,
    group,
    rows,  # Tq or T
    keys,  # Tk, or of all documents
    documents,
    behind,
    ahead,
    scale,  # of the scores, times log2(e)
    softcap,  # times log2(e)
    slope_stride,  # of sequences
    drop_below,
    keep_scale,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    HAS_KEY_START: tl.constexpr,
    PACKED: tl.constexpr,
    OWN_KEYS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PLACED: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    TMA: tl.constexpr,
):
    tile, batch_head = tile_and_head(tiles, batch_heads, section, CAUSAL)
    b, h = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    start, queries, low = tl.full((), 0, tl.int32), rows, tl.full((), 0, tl.int32)
    sequence, key_row = b, start
    if PACKED:
        sequence, tile = locate(cu_seqlens_ptr, documents, rows, tile, BLOCK_M)
        start, queries = rows_of(cu_seqlens_ptr, sequence, rows)
        if tile * BLOCK_M >= queries:
            return
        if OWN_KEYS:
            key_row, keys = rows_of(cu_seqlens_k_ptr, sequence, keys)
        else:
            key_row, keys = start, queries
    if HAS_KEY_START:
        low = tl.minimum(tl.maximum(tl.load(key_start_ptr + b), 0), keys)

    q_ptr += b * q_stride_b + h * q_stride_h + start.to(tl.int64) * q_stride_t
    k_ptr += b * k_stride_b + h // group * k_stride_h + key_row.to(tl.int64) * k_stride_t
    v_ptr += b * v_stride_b + h // group * v_stride_h + key_row.to(tl.int64) * v_stride_t
    place = (b, h // group, key_row)
    k_head = ((k_ptr, k_stride_t), k_tma, place)
    v_head = ((v_ptr, v_stride_t), v_tma, place)
    first_row = batch_head.to(tl.int64) * rows + start
    drop_row, drop_column = counted_from(seed_ptr, batch_head.to(tl.int64), rows, first_row, key_row, PLACED)

    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes_ptr + sequence * slope_stride + h) * LOG2E
    band = (behind, ahead)

    first = tile * BLOCK_M
    query = first + tl.arange(0, BLOCK_M)
    position = query + (keys - queries)
    q1, q2 = load_head(((q_ptr, q_stride_t), None, None), first, 0, queries, D, D1, D2, BLOCK_M, True, False)
    sum1, sum2 = zeros_head(BLOCK_M, D1, D2)
    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)

    first_position = first + keys - queries
    last_position = tl.minimum(first + BLOCK_M, queries) - 1 + keys - queries
    block, full_start, full_stop, stop = key_blocks(
        first_position, last_position, low, keys, band, CAUSAL, LEFT, RIGHT, BLOCK_N
    )
    for i in tl.range(full_start, full_stop, num_stages=STAGES):
        sum1, sum2, peak, total = attend_block(
            sum1, sum2, peak, total, q1, q2, k_head, v_head, seed_ptr, i, position, low, keys,
            band, scale, softcap, slope, drop_row + query, drop_column, drop_below,
            CAUSAL, LEFT, RIGHT, SOFTCAP, ALIBI, HAS_DROPOUT, D, D1, D2, BLOCK_N, False, False, TMA,
        )  # fmt: skip
    before = full_start - block
    for i in tl.range(0, before + stop - full_stop, num_stages=STAGES):
        sum1, sum2, peak, total = attend_block(
            sum1, sum2, peak, total, q1, q2, k_head, v_head, seed_ptr,
            tl.where(i < before, block + i, full_stop + i - before), position, low, keys,
            band, scale, softcap, slope, drop_row + query, drop_column, drop_below,
            CAUSAL, LEFT, RIGHT, SOFTCAP, ALIBI, HAS_DROPOUT, D, D1, D2, BLOCK_N, True, False, TMA,
        )  # fmt: skip

    in_rows = query < queries
    if CAUSAL or LEFT or RIGHT or HAS_KEY_START or PACKED:
        # A weight of zero times NaN or Inf is NaN: if a value that a row does not see got into it that way, which its
        # sum of weights shows, go over the tile again without such values, then add them to the rows that see them.
        # TMA brings in padding and other documents' values like any that a row does not see.
        not_finite = tl.sum(sum1 * 0.0, 1)
        if D2 > 0:
            not_finite += tl.sum(sum2 * 0.0, 1)
        spoiled = (not_finite != 0.0) & (total == total) & in_rows
        if tl.max(spoiled.to(tl.int32), 0) != 0:
            sum1, sum2 = zeros_head(BLOCK_M, D1, D2)
            peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            full = full_stop - full_start
            for i in tl.range(0, stop - block, num_stages=1):
                boundary = tl.where(i < full + before, block + i - full, block + i)
                sum1, sum2, peak, total = attend_block(
                    sum1, sum2, peak, total, q1, q2, k_head, v_head, seed_ptr,
                    tl.where(i < full, full_start + i, boundary), position, low, keys,
                    band, scale, softcap, slope, drop_row + query, drop_column, drop_below,
                    CAUSAL, LEFT, RIGHT, SOFTCAP, ALIBI, HAS_DROPOUT, D, D1, D2, BLOCK_N, True, True, TMA,
                )  # fmt: skip
            for key in tl.range(block * BLOCK_N, tl.minimum(stop * BLOCK_N, keys)):
                seen = sees(position, key, low, keys, band, CAUSAL, LEFT, RIGHT)[:, None]
                v1 = load_tile(v_ptr, key, v_stride_t, 0, 0, D, 0, D1, 1, False).to(tl.float32)
                sum1 += tl.where(seen & (v1 * 0.0 != 0.0), v1, 0.0)
                if D2 > 0:
                    v2 = load_tile(v_ptr, key, v_stride_t, 0, 0, D, D1, D2, 1, False).to(tl.float32)
                    sum2 += tl.where(seen & (v2 * 0.0 != 0.0), v2, 0.0)

    if HAS_SINKS:
        # One more score, of no value; it may be far above all others.
        sink = tl.load(sinks_ptr + h).to(tl.float32) * LOG2E
        top = tl.maximum(peak, sink)
        shift = tl.where(top == -float("inf"), 0.0, top)
        share = tl.exp2(peak - shift)
        total = total * share + tl.exp2(sink - shift)
        sum1, peak = sum1 * share[:, None], top
        if D2 > 0:
            sum2 = sum2 * share[:, None]
    sees_any = total != 0
    log2_total = tl.where(sees_any, peak + tl.log2(total), -float("inf"))
    inverse = keep_scale / tl.where(sees_any, total, 1.0)
    tl.store(lse_ptr + first_row + query, log2_total * LN2, mask=in_rows)
    sum1 = sum1 * inverse[:, None]
    if D2 > 0:
        sum2 = sum2 * inverse[:, None]
    # Worked out only here, so that no registers hold it during the loops.
    out_ptr += b * out_stride_b + h * out_stride_h + start.to(tl.int64) * out_stride_t
    store_head(out_ptr, first, out_stride_t, queries, sum1, sum2, D, D1, D2)
