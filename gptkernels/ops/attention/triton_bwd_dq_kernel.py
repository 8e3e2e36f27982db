"""The backward pass's first kernel: queries' gradients by tiles of queries, and the delta that the second one needs.
Nothing is added up across programs, so gradients are the same every time."""

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
    locate,
    rows_of,
    sees,
    store_head,
    tile_and_head,
    zeros_head,
)


@triton.jit
def query_grad_block(
    dq1,  # (BLOCK_M, D1) float32
    dq2,  # (BLOCK_M, D2)
    q1,  # (BLOCK_M, D1)
    q2,
    dout1,  # (BLOCK_M, D1)
    dout2,
    lse,  # (BLOCK_M,) in base 2
    delta,  # (BLOCK_M,)
    k_head,  # (keys, D), as load_head takes it
    v_head,
    seed_ptr,
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
    keep_scale,
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
    BOUNDARY: tl.constexpr,
    TMA: tl.constexpr,
):
    first = block * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)
    k1, k2 = load_head(k_head, first, low, keys, D, D1, D2, BLOCK_N, BOUNDARY, TMA)
    v1, v2 = load_head(v_head, first, low, keys, D, D1, D2, BLOCK_N, BOUNDARY, TMA)
    scores = inner_products(q1, q2, k1, k2, D2)
    if SOFTCAP or ALIBI:
        precise: tl.constexpr = q1.dtype == tl.float32
        scores, derivative = bent(
            scores, position[:, None], key[None, :], scale, softcap, slope, SOFTCAP, ALIBI, precise
        )
        scale = 1.0
    weights = tl.exp2(scores * scale - lse[:, None])
    if BOUNDARY:
        seen = sees(position[:, None], key[None, :], low, keys, band, CAUSAL, LEFT, RIGHT)
        weights = tl.where(seen, weights, 0.0)
    dweights = inner_products(dout1, dout2, v1, v2, D2)
    if HAS_DROPOUT:
        keep = kept(seed_ptr, dropout_row[:, None], dropout_column + key[None, :], drop_below)
        dweights = tl.where(keep, dweights * keep_scale, 0.0)
    dscores = weights * (dweights - delta[:, None])
    if SOFTCAP:
        dscores = dscores * derivative
    return add_weighted(dq1, dq2, dscores, k1, k2, D2)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_bwd_dq_kernel(
    dout_ptr,  # as q
    q_ptr,  # (B, H, Tq, D) or packed (T, H, D), last dimension contiguous, as all others
    k_ptr,  # (B, Hkv, Tk, D) or (T, Hkv, D)
    v_ptr,  # as k
    k_tma,  # descriptors of both parts of (B, Hkv, Tk, D) or (1, Hkv, T, D), or None
    v_tma,
    out_ptr,  # as q
    lse_ptr,  # (B, H, Tq) or (H, T) float32
    dlse_ptr,  # as lse, or unused
    delta_ptr,  # as lse: written here, for the other kernel
    dq_ptr,  # as q
    key_start_ptr,  # (B,) int32 or unused
    cu_seqlens_ptr,  # (N + 1,) int32 or unused
    cu_seqlens_k_ptr,  # (N + 1,) int32 or unused
    slopes_ptr,  # (H,) or (B or N, H) float32 or unused
    seed_ptr,  # (1,) int64 or unused
    dout_stride_b,
    dout_stride_h,
    dout_stride_t,
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
    dq_stride_b,
    dq_stride_h,
    dq_stride_t,
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
    HAS_DLSE: tl.constexpr,
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

    dout_ptr += b * dout_stride_b + h * dout_stride_h + start.to(tl.int64) * dout_stride_t
    q_ptr += b * q_stride_b + h * q_stride_h + start.to(tl.int64) * q_stride_t
    k_ptr += b * k_stride_b + h // group * k_stride_h + key_row.to(tl.int64) * k_stride_t
    v_ptr += b * v_stride_b + h // group * v_stride_h + key_row.to(tl.int64) * v_stride_t
    out_ptr += b * out_stride_b + h * out_stride_h + start.to(tl.int64) * out_stride_t
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
    in_rows = query < queries
    position = query + (keys - queries)
    dout1, dout2 = load_head(
        ((dout_ptr, dout_stride_t), None, None), first, 0, queries, D, D1, D2, BLOCK_M, True, False
    )
    out1, out2 = load_head(((out_ptr, out_stride_t), None, None), first, 0, queries, D, D1, D2, BLOCK_M, True, False)
    delta = tl.sum(dout1.to(tl.float32) * out1.to(tl.float32), 1)
    if D2 > 0:
        delta += tl.sum(dout2.to(tl.float32) * out2.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + first_row + query, mask=in_rows, other=0.0)
    tl.store(delta_ptr + first_row + query, delta, mask=in_rows)
    q1, q2 = load_head(((q_ptr, q_stride_t), None, None), first, 0, queries, D, D1, D2, BLOCK_M, True, False)
    lse = tl.load(lse_ptr + first_row + query, mask=in_rows, other=float("inf")) * LOG2E
    dq1, dq2 = zeros_head(BLOCK_M, D1, D2)

    first_position = first + keys - queries
    last_position = tl.minimum(first + BLOCK_M, queries) - 1 + keys - queries
    block, full_start, full_stop, stop = key_blocks(
        first_position, last_position, low, keys, band, CAUSAL, LEFT, RIGHT, BLOCK_N
    )
    for i in tl.range(full_start, full_stop, num_stages=STAGES):
        dq1, dq2 = query_grad_block(
            dq1, dq2, q1, q2, dout1, dout2, lse, delta, k_head, v_head, seed_ptr, i,
            position, low, keys, band, scale, softcap, slope, drop_row + query, drop_column, drop_below, keep_scale,
            CAUSAL, LEFT, RIGHT, SOFTCAP, ALIBI, HAS_DROPOUT, D, D1, D2, BLOCK_N, False, TMA,
        )  # fmt: skip
    before = full_start - block
    for i in tl.range(0, before + stop - full_stop, num_stages=STAGES):
        dq1, dq2 = query_grad_block(
            dq1, dq2, q1, q2, dout1, dout2, lse, delta, k_head, v_head, seed_ptr,
            tl.where(i < before, block + i, full_stop + i - before),
            position, low, keys, band, scale, softcap, slope, drop_row + query, drop_column, drop_below, keep_scale,
            CAUSAL, LEFT, RIGHT, SOFTCAP, ALIBI, HAS_DROPOUT, D, D1, D2, BLOCK_N, True, TMA,
        )  # fmt: skip
    dq1 = dq1 * (scale * LN2)
    if D2 > 0:
        dq2 = dq2 * (scale * LN2)
    # Worked out only here, so that no registers hold it during the loops.
    dq_ptr += b * dq_stride_b + h * dq_stride_h + start.to(tl.int64) * dq_stride_t
    store_head(dq_ptr, first, dq_stride_t, queries, dq1, dq2, D, D1, D2)
