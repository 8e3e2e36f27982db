"""The rotation in Triton, alone or after RMSNorms of the heads: a program has some tokens of some heads, of the queries
or of the keys. Heads of a token follow each other: their tables are in a cache, and in memory they are often
neighbours.
"""

import triton
import triton.language as tl


@triton.jit
def columns(BLOCK_R: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """-> pairs, and the first and second dimension of each: (1, BLOCK_R)"""
    pair = tl.arange(0, BLOCK_R)[None, :]
    if INTERLEAVED:
        return pair, 2 * pair, 2 * pair + 1
    return pair, pair, pair + R // 2


@triton.jit
def load_tables(
    cos_ptr,  # (ROWS, 1) of a row's angles
    sin_ptr,
    pair,
    first,
    second,
    mask,
    dtype: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """-> cos and sin of the first dimensions of pairs and of the second: (ROWS, BLOCK_R), rounded as the models do"""
    at = first if WHOLE else pair
    cos_1 = tl.load(cos_ptr + at, mask=mask, other=0.0).to(dtype).to(tl.float32)
    sin_1 = tl.load(sin_ptr + at, mask=mask, other=0.0).to(dtype).to(tl.float32)
    cos_2, sin_2 = cos_1, sin_1
    if WHOLE:
        cos_2 = tl.load(cos_ptr + second, mask=mask, other=0.0).to(dtype).to(tl.float32)
        sin_2 = tl.load(sin_ptr + second, mask=mask, other=0.0).to(dtype).to(tl.float32)
    return cos_1, sin_1, cos_2, sin_2


@triton.jit
def load_head(ptr, first, second, rest, mask, rest_mask, BLOCK_REST: tl.constexpr):
    """ptr: (ROWS, 1) -> the first and second dimensions of pairs, and what is not rotated, in float32"""
    x_1 = tl.load(ptr + first, mask=mask, other=0.0).to(tl.float32)
    x_2 = tl.load(ptr + second, mask=mask, other=0.0).to(tl.float32)
    x_3 = x_1
    if BLOCK_REST > 0:
        x_3 = tl.load(ptr + rest, mask=rest_mask, other=0.0).to(tl.float32)
    return x_1, x_2, x_3


@triton.jit
def store_head(ptr, x_1, x_2, x_3, first, second, rest, mask, rest_mask, BLOCK_REST: tl.constexpr):
    dtype = ptr.dtype.element_ty
    tl.store(ptr + first, x_1.to(dtype), mask=mask)
    tl.store(ptr + second, x_2.to(dtype), mask=mask)
    if BLOCK_REST > 0:
        tl.store(ptr + rest, x_3.to(dtype), mask=rest_mask)


@triton.jit
def normalised(x, rstd, weight, dtype: tl.constexpr, CAST_FIRST: tl.constexpr):
    """x: (ROWS, N), rstd: (ROWS, 1), weight: (1, N) with its offset -> rounded as gptkernels.rms_norm does"""
    y = x * rstd
    if CAST_FIRST:
        y = y.to(dtype).to(tl.float32)
    return (y * weight).to(dtype).to(tl.float32)


@triton.jit
def sum_of_rows(x_1, x_2, x_3, BLOCK_REST: tl.constexpr):
    """-> (ROWS, 1)"""
    total = tl.sum(x_1, 1) + tl.sum(x_2, 1)
    if BLOCK_REST > 0:
        total += tl.sum(x_3, 1)
    return total[:, None]


@triton.jit
def rope_fwd_kernel(
    q_ptr,  # (B, H, T, D)
    k_ptr,  # (B, Hkv, T, D)
    cos_ptr,  # (T, W) or (B, T, W)
    sin_ptr,
    q_out_ptr,  # as q
    k_out_ptr,  # as k
    q_norm_ptr,  # (D,)
    k_norm_ptr,
    q_rstd_ptr,  # (B, H, T) float32
    k_rstd_ptr,  # (B, Hkv, T) float32
    q_heads,
    k_heads,
    tokens,
    q_rows,  # B * H * T
    k_rows,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    q_out_stride_b,
    q_out_stride_h,
    q_out_stride_t,
    k_out_stride_b,
    k_out_stride_h,
    k_out_stride_t,
    cos_stride_b,  # 0: the same for every row of the batch
    cos_stride_t,
    sin_stride_b,
    sin_stride_t,
    eps,
    offset,
    D: tl.constexpr,
    R: tl.constexpr,  # of which are rotated
    WHOLE: tl.constexpr,  # cos and sin have R columns, else R / 2
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,  # of R / 2
    BLOCK_REST: tl.constexpr,  # of D - R
    TRANSPOSED: tl.constexpr,
    NORMED: tl.constexpr,
    CAST_FIRST: tl.constexpr,
):
    if tl.program_id(1) == 0:
        x_ptr, out_ptr, heads, rows = q_ptr, q_out_ptr, q_heads, q_rows
        stride_b, stride_h, stride_t = q_stride_b.to(tl.int64), q_stride_h.to(tl.int64), q_stride_t.to(tl.int64)
        out_b, out_h, out_t = q_out_stride_b.to(tl.int64), q_out_stride_h.to(tl.int64), q_out_stride_t.to(tl.int64)
        norm_ptr, rstd_ptr = q_norm_ptr, q_rstd_ptr
    else:
        x_ptr, out_ptr, heads, rows = k_ptr, k_out_ptr, k_heads, k_rows
        stride_b, stride_h, stride_t = k_stride_b.to(tl.int64), k_stride_h.to(tl.int64), k_stride_t.to(tl.int64)
        out_b, out_h, out_t = k_out_stride_b.to(tl.int64), k_out_stride_h.to(tl.int64), k_out_stride_t.to(tl.int64)
        norm_ptr, rstd_ptr = k_norm_ptr, k_rstd_ptr
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    b, t, h = row // heads // tokens, row // heads % tokens, row % heads
    x_ptr += b * stride_b + h * stride_h + t * stride_t
    out_ptr += b * out_b + h * out_h + t * out_t
    cos_ptr += b * cos_stride_b + t * cos_stride_t
    sin_ptr += b * sin_stride_b + t * sin_stride_t

    pair, first, second = columns(BLOCK_R, R, INTERLEAVED)
    rest = pair
    if BLOCK_REST > 0:
        rest = R + tl.arange(0, BLOCK_REST)[None, :]
    mask, rest_mask = (row < rows) & (pair < R // 2), (row < rows) & (rest < D)
    dtype = x_ptr.dtype.element_ty
    x_1, x_2, x_3 = load_head(x_ptr, first, second, rest, mask, rest_mask, BLOCK_REST)
    cos_1, sin_1, cos_2, sin_2 = load_tables(cos_ptr, sin_ptr, pair, first, second, mask, dtype, WHOLE)
    if NORMED:
        w_1, w_2, w_3 = load_head(norm_ptr, first, second, rest, pair < R // 2, rest < D, BLOCK_REST)
        rstd = tl.rsqrt(sum_of_rows(x_1 * x_1, x_2 * x_2, x_3 * x_3, BLOCK_REST) / D + eps)
        tl.store(rstd_ptr + (b * heads + h) * tokens + t, rstd, mask=row < rows)
        x_1 = normalised(x_1, rstd, w_1 + offset, dtype, CAST_FIRST)
        x_2 = normalised(x_2, rstd, w_2 + offset, dtype, CAST_FIRST)
        x_3 = normalised(x_3, rstd, w_3 + offset, dtype, CAST_FIRST)
    if TRANSPOSED:
        y_1, y_2 = x_1 * cos_1 + x_2 * sin_2, x_2 * cos_2 - x_1 * sin_1
    else:
        y_1, y_2 = x_1 * cos_1 - x_2 * sin_1, x_2 * cos_2 + x_1 * sin_2
    store_head(out_ptr, y_1, y_2, x_3, first, second, rest, mask, rest_mask, BLOCK_REST)


@triton.jit
def rope_norm_bwd_kernel(
    q_ptr,  # (B, H, T, D)
    k_ptr,  # (B, Hkv, T, D)
    cos_ptr,  # (T, W) or (B, T, W)
    sin_ptr,
    grad_q_ptr,  # as q
    grad_k_ptr,  # as k
    q_norm_ptr,  # (D,)
    k_norm_ptr,
    q_rstd_ptr,  # (B, H, T) float32
    k_rstd_ptr,  # (B, Hkv, T) float32
    dq_ptr,  # (B, H, T, D)
    dk_ptr,  # (B, Hkv, T, D)
    partials_ptr,  # (2, programs, D) float32: sums for the gradients of q_norm and k_norm
    q_heads,
    k_heads,
    tokens,
    q_rows,
    k_rows,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    grad_q_stride_b,
    grad_q_stride_h,
    grad_q_stride_t,
    grad_k_stride_b,
    grad_k_stride_h,
    grad_k_stride_t,
    cos_stride_b,
    cos_stride_t,
    sin_stride_b,
    sin_stride_t,
    offset,
    dq_stride_b,
    dq_stride_h,
    dq_stride_t,
    dk_stride_b,
    dk_stride_h,
    dk_stride_t,
    D: tl.constexpr,
    R: tl.constexpr,
    WHOLE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    CAST_FIRST: tl.constexpr,
):
    """The gradient rotated back, then through the norm: with y = n * w, n = x * rstd,
    dx = rstd * (dy w - n mean(dy w n)), dw = sum(dy n)."""
    if tl.program_id(1) == 0:
        x_ptr, grad_ptr, dy_ptr, heads, rows = q_ptr, grad_q_ptr, dq_ptr, q_heads, q_rows
        x_b, x_h, x_t = q_stride_b.to(tl.int64), q_stride_h.to(tl.int64), q_stride_t.to(tl.int64)
        grad_b, grad_h, grad_t = (
            grad_q_stride_b.to(tl.int64),
            grad_q_stride_h.to(tl.int64),
            grad_q_stride_t.to(tl.int64),
        )
        dy_b, dy_h, dy_t = dq_stride_b.to(tl.int64), dq_stride_h.to(tl.int64), dq_stride_t.to(tl.int64)
        norm_ptr, rstd_ptr = q_norm_ptr, q_rstd_ptr
    else:
        x_ptr, grad_ptr, dy_ptr, heads, rows = k_ptr, grad_k_ptr, dk_ptr, k_heads, k_rows
        x_b, x_h, x_t = k_stride_b.to(tl.int64), k_stride_h.to(tl.int64), k_stride_t.to(tl.int64)
        grad_b, grad_h, grad_t = (
            grad_k_stride_b.to(tl.int64),
            grad_k_stride_h.to(tl.int64),
            grad_k_stride_t.to(tl.int64),
        )
        dy_b, dy_h, dy_t = dk_stride_b.to(tl.int64), dk_stride_h.to(tl.int64), dk_stride_t.to(tl.int64)
        norm_ptr, rstd_ptr = k_norm_ptr, k_rstd_ptr
    pair, first, second = columns(BLOCK_R, R, INTERLEAVED)
    rest = pair
    if BLOCK_REST > 0:
        rest = R + tl.arange(0, BLOCK_REST)[None, :]
    dtype = x_ptr.dtype.element_ty
    w_1, w_2, w_3 = load_head(norm_ptr, first, second, rest, pair < R // 2, rest < D, BLOCK_REST)
    w_1, w_2, w_3 = w_1 + offset, w_2 + offset, w_3 + offset
    sum_1 = tl.zeros((ROWS, BLOCK_R), dtype=tl.float32)
    sum_2 = tl.zeros((ROWS, BLOCK_R), dtype=tl.float32)
    sum_3 = sum_1
    if BLOCK_REST > 0:
        sum_3 = tl.zeros((ROWS, BLOCK_REST), dtype=tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = tl.arange(0, ROWS)[:, None].to(tl.int64) + start
        b, t, h = row // heads // tokens, row // heads % tokens, row % heads
        mask, rest_mask = (row < rows) & (pair < R // 2), (row < rows) & (rest < D)
        x_at = x_ptr + b * x_b + h * x_h + t * x_t
        dy_at = dy_ptr + b * dy_b + h * dy_h + t * dy_t
        x_1, x_2, x_3 = load_head(x_at, first, second, rest, mask, rest_mask, BLOCK_REST)
        dy_1, dy_2, dy_3 = load_head(dy_at, first, second, rest, mask, rest_mask, BLOCK_REST)
        cos_at, sin_at = cos_ptr + b * cos_stride_b + t * cos_stride_t, sin_ptr + b * sin_stride_b + t * sin_stride_t
        cos_1, sin_1, cos_2, sin_2 = load_tables(cos_at, sin_at, pair, first, second, mask, dtype, WHOLE)
        rstd = tl.load(rstd_ptr + (b * heads + h) * tokens + t, mask=row < rows, other=0.0)
        dy_1, dy_2 = dy_1 * cos_1 + dy_2 * sin_2, dy_2 * cos_2 - dy_1 * sin_1
        n_1, n_2, n_3 = x_1 * rstd, x_2 * rstd, x_3 * rstd
        if CAST_FIRST:
            sum_1 += dy_1 * n_1.to(dtype).to(tl.float32)
            sum_2 += dy_2 * n_2.to(dtype).to(tl.float32)
        else:
            sum_1 += dy_1 * n_1
            sum_2 += dy_2 * n_2
        if BLOCK_REST > 0:
            sum_3 += dy_3 * (n_3.to(dtype).to(tl.float32) if CAST_FIRST else n_3)
        dy_1, dy_2, dy_3 = dy_1 * w_1, dy_2 * w_2, dy_3 * w_3
        mean = sum_of_rows(dy_1 * n_1, dy_2 * n_2, dy_3 * n_3, BLOCK_REST) / D
        grad_at = grad_ptr + b * grad_b + h * grad_h + t * grad_t
        grad_1, grad_2, grad_3 = rstd * (dy_1 - n_1 * mean), rstd * (dy_2 - n_2 * mean), rstd * (dy_3 - n_3 * mean)
        store_head(grad_at, grad_1, grad_2, grad_3, first, second, rest, mask, rest_mask, BLOCK_REST)
    partials_ptr += (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * D
    tl.store(partials_ptr + first, tl.sum(sum_1, 0)[None, :], mask=pair < R // 2)
    tl.store(partials_ptr + second, tl.sum(sum_2, 0)[None, :], mask=pair < R // 2)
    if BLOCK_REST > 0:
        tl.store(partials_ptr + rest, tl.sum(sum_3, 0)[None, :], mask=rest < D)
