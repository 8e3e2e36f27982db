"""The backward pass's second kernel: keys' and values' gradients by tiles of keys. Nothing is added up across programs,
so gradients are the same every time."""

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
    load_head,
    locate,
    query_blocks,
    rows_of,
    sees,
    store_head,
    tile_and_head,
    zeros_head,
)


@triton.jit
def key_grad_block(
    dk1,  # (BLOCK_N, D1) float32
    dk2,  # (BLOCK_N, D2)
    dv1,
    dv2,
    k1,  # (BLOCK_N, D1)
    k2,
    v1,
    v2,
    dout_head,  # (queries, D), as load_head takes it
    q_head,
    lse_ptr,  # (queries,)
    delta_ptr,  # (queries,)
    seed_ptr,
    block,
    key,  # (BLOCK_N,)
    low,
    offset,
    queries,
    keys,
    band,
    scale,
    softcap,
    slope,
    dropout_row,
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
    BLOCK_M: tl.constexpr,
    BOUNDARY: tl.constexpr,
    TMA: tl.constexpr,
):
    first = block * BLOCK_M
    query = first + tl.arange(0, BLOCK_M)
    q1, q2 = load_head(q_head, first, 0, queries, D, D1, D2, BLOCK_M, BOUNDARY, TMA)
    dout1, dout2 = load_head(dout_head, first, 0, queries, D, D1, D2, BLOCK_M, BOUNDARY, TMA)
    if BOUNDARY:
        lse = tl.load(lse_ptr + query, mask=query < queries, other=0.0)
        delta = tl.load(delta_ptr + query, mask=query < queries, other=0.0)
    else:
        lse, delta = tl.load(lse_ptr + query), tl.load(delta_ptr + query)
    # Keys by queries, so that the sums over queries below take them as they are.
    scores = inner_products(k1, k2, q1, q2, D2)
    if SOFTCAP or ALIBI:
        precise: tl.constexpr = q1.dtype == tl.float32
        scores, derivative = bent(
            scores, (query + offset)[None, :], key[:, None], scale, softcap, slope, SOFTCAP, ALIBI, precise
        )
        scale = 1.0
    weights = tl.exp2(scores * scale - (lse * LOG2E)[None, :])
    if BOUNDARY:
        seen = sees((query + offset)[None, :], key[:, None], low, keys, band, CAUSAL, LEFT, RIGHT)
        weights = tl.where(seen & (query < queries)[None, :], weights, 0.0)
    dweights = inner_products(v1, v2, dout1, dout2, D2)
    kept_weights = weights
    if HAS_DROPOUT:
        row = dropout_row + query
        keep = kept(seed_ptr, row[None, :], dropout_column + key[:, None], drop_below)
        kept_weights = tl.where(keep, weights * keep_scale, 0.0)
        dweights = tl.where(keep, dweights * keep_scale, 0.0)
    dv1, dv2 = add_weighted(dv1, dv2, kept_weights, dout1, dout2, D2)
    dscores = weights * (dweights - delta[None, :])
    if SOFTCAP:
        dscores = dscores * derivative
    dk1, dk2 = add_weighted(dk1, dk2, dscores, q1, q2, D2)
    return dk1, dk2, dv1, dv2


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_bwd_dkdv_kernel(
    dout_ptr,  # as q
    q_ptr,  # (B, H, Tq, D) or packed (T, H, D), last dimension contiguous, as all others
    k_ptr,  # (B, Hkv, Tk, D) or (T, Hkv, D)
    v_ptr,  # as k
    dout_tma,  # descriptors of both parts of (B, H, Tq, D) or (1, H, T, D), or None
    q_tma,
    lse_ptr,  # (B, H, Tq) or (H, T) float32
    delta_ptr,  # as lse
    dk_ptr,  # as k
    dv_ptr,  # as k
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
    dk_stride_b,
    dk_stride_h,
    dk_stride_t,
    dv_stride_b,
    dv_stride_h,
    dv_stride_t,
    tiles,
    batch_heads,  # B * Hkv
    section,
    heads,  # Hkv
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
    tile, batch_head = tile_and_head(tiles, batch_heads, section, False)
    b, h = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    start, queries, low = tl.full((), 0, tl.int32), rows, tl.full((), 0, tl.int32)
    sequence, key_row = b, start
    if PACKED:
        if OWN_KEYS:
            sequence, tile = locate(cu_seqlens_k_ptr, documents, keys, tile, BLOCK_N)
            key_row, keys = rows_of(cu_seqlens_k_ptr, sequence, keys)
            start, queries = rows_of(cu_seqlens_ptr, sequence, rows)
        else:
            sequence, tile = locate(cu_seqlens_ptr, documents, rows, tile, BLOCK_N)
            start, queries = rows_of(cu_seqlens_ptr, sequence, rows)
            key_row, keys = start, queries
        if tile * BLOCK_N >= keys:
            return
    if HAS_KEY_START:
        low = tl.minimum(tl.maximum(tl.load(key_start_ptr + b), 0), keys)

    dout_ptr += b * dout_stride_b + start.to(tl.int64) * dout_stride_t
    q_ptr += b * q_stride_b + start.to(tl.int64) * q_stride_t
    k_ptr += b * k_stride_b + h * k_stride_h + key_row.to(tl.int64) * k_stride_t
    v_ptr += b * v_stride_b + h * v_stride_h + key_row.to(tl.int64) * v_stride_t

    first = tile * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)
    offset = keys - queries
    k1, k2 = load_head(((k_ptr, k_stride_t), None, None), first, low, keys, D, D1, D2, BLOCK_N, True, False)
    v1, v2 = load_head(((v_ptr, v_stride_t), None, None), first, low, keys, D, D1, D2, BLOCK_N, True, False)
    dk1, dk2 = zeros_head(BLOCK_N, D1, D2)
    dv1, dv2 = zeros_head(BLOCK_N, D1, D2)
    last = tl.minimum(first + BLOCK_N, keys) - 1
    block, full_start, full_stop, stop = query_blocks(
        first, last, low, offset, queries, (behind, ahead), CAUSAL, LEFT, RIGHT, BLOCK_M
    )
    # All blocks of one query head after the other, in one loop: two nested ones would need twice the registers.
    first_head = b * heads * group + h * group
    full = tl.maximum(full_stop - full_start, 1)
    for i in tl.range(0, (full_stop - full_start) * group, num_stages=STAGES):
        head, first_row = h * group + i // full, (first_head + i // full) * rows + start
        drop_row, drop_column = counted_from(seed_ptr, first_head + i // full, rows, first_row, key_row, PLACED)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + sequence * slope_stride + head) * LOG2E
        dout_head = ((dout_ptr + head * dout_stride_h, dout_stride_t), dout_tma, (b, head, start))
        q_head = ((q_ptr + head * q_stride_h, q_stride_t), q_tma, (b, head, start))
        dk1, dk2, dv1, dv2 = key_grad_block(
            dk1, dk2, dv1, dv2, k1, k2, v1, v2, dout_head, q_head,
            lse_ptr + first_row, delta_ptr + first_row, seed_ptr, full_start + i % full,
            key, low, offset, queries, keys, (behind, ahead), scale, softcap, slope, drop_row, drop_column,
            drop_below, keep_scale,
            CAUSAL, LEFT, RIGHT, SOFTCAP, ALIBI, HAS_DROPOUT, D, D1, D2, BLOCK_M, False, TMA,
        )  # fmt: skip
    before = full_start - block
    boundary = tl.maximum(before + stop - full_stop, 1)
    # Blocks on their way while others are worked on take registers too, which the mask needs.
    BOUNDARY_STAGES: tl.constexpr = 1 if TMA and D1 == 128 and D2 == 0 else STAGES
    for i in tl.range(0, (before + stop - full_stop) * group, num_stages=BOUNDARY_STAGES):
        head, first_row, j = h * group + i // boundary, (first_head + i // boundary) * rows + start, i % boundary
        drop_row, drop_column = counted_from(seed_ptr, first_head + i // boundary, rows, first_row, key_row, PLACED)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes_ptr + sequence * slope_stride + head) * LOG2E
        dout_head = ((dout_ptr + head * dout_stride_h, dout_stride_t), dout_tma, (b, head, start))
        q_head = ((q_ptr + head * q_stride_h, q_stride_t), q_tma, (b, head, start))
        dk1, dk2, dv1, dv2 = key_grad_block(
            dk1, dk2, dv1, dv2, k1, k2, v1, v2, dout_head, q_head,
            lse_ptr + first_row, delta_ptr + first_row, seed_ptr,
            tl.where(j < before, block + j, full_stop + j - before),
            key, low, offset, queries, keys, (behind, ahead), scale, softcap, slope, drop_row, drop_column,
            drop_below, keep_scale,
            CAUSAL, LEFT, RIGHT, SOFTCAP, ALIBI, HAS_DROPOUT, D, D1, D2, BLOCK_M, True, TMA,
        )  # fmt: skip
    dk1 = dk1 * (scale * LN2)
    if D2 > 0:
        dk2 = dk2 * (scale * LN2)
    dk_ptr += b * dk_stride_b + h * dk_stride_h + key_row.to(tl.int64) * dk_stride_t
    store_head(dk_ptr, first, dk_stride_t, keys, dk1, dk2, D, D1, D2)
    dv_ptr += b * dv_stride_b + h * dv_stride_h + key_row.to(tl.int64) * dv_stride_t
    store_head(dv_ptr, first, dv_stride_t, keys, dv1, dv2, D, D1, D2)
