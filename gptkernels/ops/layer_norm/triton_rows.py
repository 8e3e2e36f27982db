"""LayerNorm and RMSNorm in Triton: a row in registers, one pass over memory each way; rows that do not fit are read
again. RMSNorm is LayerNorm without a mean to take off and without a bias."""

import triton
import triton.language as tl

from ..triton_dropout import kept


@triton.jit
def add_residual(
    x_ptr,  # row starts: (ROWS, 1) pointers, as for residual and h
    residual_ptr,
    h_ptr,
    seed_ptr,
    row,
    column,
    mask,
    drop_below,
    keep_scale,
    HAS_RESIDUAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    """-> h = dropout(x) + residual: (ROWS, BLOCK) float32, as rounded in memory; x itself without a residual"""
    h = tl.load(x_ptr + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        if HAS_DROPOUT:
            h = tl.where(kept(seed_ptr, row, column, drop_below), h * keep_scale, 0.0)
        h += tl.load(residual_ptr + column, mask=mask, other=0.0).to(tl.float32)
        h_rounded = h.to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + column, h_rounded, mask=mask)
        # Backward will read the rounded h, so that is what is normalised.
        h = h_rounded.to(tl.float32)
    return h


@triton.jit
def row_offset(row, stride, group_stride, group_rows, GROUPED: tl.constexpr):
    """Where rows start; GROUPED: in groups of group_rows, the groups group_stride apart"""
    if GROUPED:
        group = row.to(tl.int32) // group_rows
        return group.to(tl.int64) * group_stride + (row - group * group_rows) * stride
    return row * stride


@triton.jit
def load_scale(weight_ptr, offset, column, column_mask, RMS: tl.constexpr):
    """What a normalised row is multiplied by: (1, BLOCK) float32"""
    if weight_ptr is None:
        scale = 1.0
    else:
        scale = tl.load(weight_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
        if RMS:
            scale += offset
    return scale


@triton.jit
def store_normalised(
    y_ptr,  # row starts: (ROWS, 1) pointers
    h,  # (ROWS, BLOCK) float32
    mean,  # (ROWS, 1), or 0 of RMSNorm
    rstd,  # (ROWS, 1)
    weight_ptr,
    bias_ptr,
    offset,
    column,
    mask,
    column_mask,
    HAS_BIAS: tl.constexpr,
    RMS: tl.constexpr,
    CAST_FIRST: tl.constexpr,
):
    y = (h - mean) * rstd
    if CAST_FIRST:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
    y *= load_scale(weight_ptr, offset, column, column_mask, RMS)
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr,  # (M, N), rows x_stride apart
    residual_ptr,  # (M, N), rows residual_stride apart, or unused
    weight_ptr,  # (N,), or None of RMSNorm
    bias_ptr,  # (N,) or unused
    seed_ptr,  # (1,) int64 or unused
    y_ptr,  # (M, N)
    h_ptr,  # (M, N) or unused
    mean_ptr,  # (M,), or None of RMSNorm
    rstd_ptr,  # (M,)
    M,
    N,
    x_stride,
    x_group_stride,
    group_rows,
    residual_stride,
    eps,
    offset,
    drop_below,
    keep_scale,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    RMS: tl.constexpr,
    CAST_FIRST: tl.constexpr,  # the normalised row is rounded to y's dtype before the product with the weight too
    GROUPED: tl.constexpr,  # x is: see row_offset
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE_ROW: tl.constexpr,  # BLOCK >= N: the row stays in registers
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_mask = row < M
    lane = tl.arange(0, BLOCK)[None, :]
    x_ptr += row_offset(row, x_stride, x_group_stride, group_rows, GROUPED)
    residual_ptr += row * residual_stride
    y_ptr += row * N
    h_ptr += row * N

    if WHOLE_ROW:
        mask = row_mask & (lane < N)
        h = add_residual(
            x_ptr, residual_ptr, h_ptr, seed_ptr, row, lane, mask, drop_below, keep_scale, HAS_RESIDUAL, HAS_DROPOUT
        )
        mean = 0.0 if RMS else tl.sum(h, axis=1)[:, None] / N
        centred = tl.where(mask, h - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / N + eps)
        store_normalised(
            y_ptr, h, mean, rstd, weight_ptr, bias_ptr, offset, lane, mask, lane < N, HAS_BIAS, RMS, CAST_FIRST
        )
    else:
        source_ptr = h_ptr if HAS_RESIDUAL else x_ptr
        partial = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for start in range(0, N, BLOCK):
            column = start + lane
            mask = row_mask & (column < N)
            h = add_residual(
                x_ptr, residual_ptr, h_ptr, seed_ptr, row, column, mask, drop_below, keep_scale, HAS_RESIDUAL,
                HAS_DROPOUT,
            )  # fmt: skip
            partial += h * h if RMS else h
        mean = 0.0 if RMS else tl.sum(partial, axis=1)[:, None] / N
        if not RMS:
            partial = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for start in range(0, N, BLOCK):
                column = start + lane
                mask = row_mask & (column < N)
                h = tl.load(source_ptr + column, mask=mask, other=0.0).to(tl.float32)
                centred = tl.where(mask, h - mean, 0.0)
                partial += centred * centred
        rstd = tl.rsqrt(tl.sum(partial, axis=1)[:, None] / N + eps)
        for start in range(0, N, BLOCK):
            column = start + lane
            mask = row_mask & (column < N)
            h = tl.load(source_ptr + column, mask=mask, other=0.0).to(tl.float32)
            store_normalised(
                y_ptr, h, mean, rstd, weight_ptr, bias_ptr, offset, column, mask, column < N, HAS_BIAS, RMS, CAST_FIRST
            )

    if not RMS:
        tl.store(mean_ptr + row, mean, mask=row_mask)
    tl.store(rstd_ptr + row, rstd, mask=row_mask)


@triton.jit
def x_hat_and_weighted_dy(dy_ptr, h_ptr, weight_ptr, mean, rstd, offset, column, mask, column_mask, RMS: tl.constexpr):
    """-> dy, x_hat, dy * weight: (ROWS, BLOCK) float32, zero outside of the rows"""
    dy = tl.load(dy_ptr + column, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + column, mask=mask, other=0.0).to(tl.float32)
    scale = load_scale(weight_ptr, offset, column, column_mask, RMS)
    return dy, tl.where(mask, (h - mean) * rstd, 0.0), dy * scale


@triton.jit
def store_grad_x(
    grad_h,  # (ROWS, BLOCK) float32, without dh
    dh_ptr,  # row starts, as for grad_h_ptr and grad_x_ptr
    grad_h_ptr,
    grad_x_ptr,
    seed_ptr,
    row,
    column,
    mask,
    drop_below,
    keep_scale,
    HAS_DH: tl.constexpr,
    HAS_GRAD_X: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
):
    if HAS_DH:
        grad_h += tl.load(dh_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_h_ptr + column, grad_h.to(grad_h_ptr.dtype.element_ty), mask=mask)
    if HAS_GRAD_X:
        if HAS_DROPOUT:
            grad_h = tl.where(kept(seed_ptr, row, column, drop_below), grad_h * keep_scale, 0.0)
        tl.store(grad_x_ptr + column, grad_h.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_bwd_kernel(
    dy_ptr,  # (M, N), rows dy_stride apart
    dh_ptr,  # (M, N), rows dh_stride apart, or unused
    h_ptr,  # (M, N), rows h_stride apart
    weight_ptr,  # (N,), or None of RMSNorm
    mean_ptr,  # (M,), or None of RMSNorm
    rstd_ptr,  # (M,)
    seed_ptr,  # (1,) int64 or unused
    grad_h_ptr,  # (M, N)
    grad_x_ptr,  # (M, N) or unused
    partials_ptr,  # (2, programs, N) float32 or unused: each program's share of the weight's and the bias's gradient
    M,
    N,
    dy_stride,
    dy_group_stride,
    dh_stride,
    h_stride,
    h_group_stride,
    group_rows,
    offset,
    drop_below,
    keep_scale,
    HAS_DH: tl.constexpr,
    HAS_GRAD_X: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_PARTIALS: tl.constexpr,
    RMS: tl.constexpr,
    GROUPED: tl.constexpr,  # dy and h are: see row_offset
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    lane = tl.arange(0, BLOCK)[None, :]
    weight_partial_ptr = partials_ptr + program * N
    bias_partial_ptr = partials_ptr + (programs + program) * N
    grad_weight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    grad_bias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)

    for tile in range(program, tl.cdiv(M, ROWS), programs):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]  # int64, as `program` is
        row_mask = row < M
        mean = 0.0 if RMS else tl.load(mean_ptr + row, mask=row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
        dy_row = dy_ptr + row_offset(row, dy_stride, dy_group_stride, group_rows, GROUPED)
        h_row = h_ptr + row_offset(row, h_stride, h_group_stride, group_rows, GROUPED)
        dh_row = dh_ptr + row * dh_stride
        grad_h_row = grad_h_ptr + row * N
        grad_x_row = grad_x_ptr + row * N

        if WHOLE_ROW:
            mask = row_mask & (lane < N)
            dy, x_hat, wdy = x_hat_and_weighted_dy(
                dy_row, h_row, weight_ptr, mean, rstd, offset, lane, mask, lane < N, RMS
            )
            if HAS_PARTIALS:
                grad_weight += dy * x_hat
                if not RMS:
                    grad_bias += dy
            along_x_hat = tl.sum(wdy * x_hat, axis=1)[:, None] / N
            along_one = 0.0 if RMS else tl.sum(wdy, axis=1)[:, None] / N
            grad_h = (wdy - x_hat * along_x_hat - along_one) * rstd
            store_grad_x(
                grad_h, dh_row, grad_h_row, grad_x_row, seed_ptr, row, lane, mask, drop_below, keep_scale, HAS_DH,
                HAS_GRAD_X, HAS_DROPOUT,
            )  # fmt: skip
        else:
            sum_x_hat = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            sum_one = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for start in range(0, N, BLOCK):
                column = start + lane
                mask = row_mask & (column < N)
                dy, x_hat, wdy = x_hat_and_weighted_dy(
                    dy_row, h_row, weight_ptr, mean, rstd, offset, column, mask, column < N, RMS
                )
                sum_x_hat += wdy * x_hat
                if not RMS:
                    sum_one += wdy
            along_x_hat = tl.sum(sum_x_hat, axis=1)[:, None] / N
            along_one = 0.0 if RMS else tl.sum(sum_one, axis=1)[:, None] / N
            for start in range(0, N, BLOCK):
                column = start + lane
                mask = row_mask & (column < N)
                dy, x_hat, wdy = x_hat_and_weighted_dy(
                    dy_row, h_row, weight_ptr, mean, rstd, offset, column, mask, column < N, RMS
                )
                if HAS_PARTIALS:
                    # No other program touches this row of partials; it starts out as zeros.
                    accumulate(weight_partial_ptr, dy * x_hat, column, N)
                    if not RMS:
                        accumulate(bias_partial_ptr, dy, column, N)
                grad_h = (wdy - x_hat * along_x_hat - along_one) * rstd
                store_grad_x(
                    grad_h, dh_row, grad_h_row, grad_x_row, seed_ptr, row, column, mask, drop_below, keep_scale, HAS_DH,
                    HAS_GRAD_X, HAS_DROPOUT,
                )  # fmt: skip

    if HAS_PARTIALS and WHOLE_ROW:
        column = tl.arange(0, BLOCK)
        tl.store(weight_partial_ptr + column, tl.sum(grad_weight, axis=0), mask=column < N)
        if not RMS:
            tl.store(bias_partial_ptr + column, tl.sum(grad_bias, axis=0), mask=column < N)


@triton.jit
def accumulate(partial_ptr, value, column, N):
    """partial: (N,) += value: (1, BLOCK) at column"""
    total = tl.load(partial_ptr + column, mask=column < N, other=0.0) + value
    tl.store(partial_ptr + column, total, mask=column < N)


@triton.jit
def layer_norm_bwd_reduce_kernel(
    partials_ptr,  # (2, P, N) float32
    grad_weight_ptr,  # (N,) or unused
    grad_bias_ptr,  # (N,) or unused
    P,
    N,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums the programs' shares in one fixed order: the gradients are the same bits every time."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    grad_weight = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK_P, BLOCK_N), dtype=tl.float32)
    for start in range(0, P, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P).to(tl.int64)[:, None]
        mask = (part < P) & (column < N)
        if HAS_WEIGHT:
            grad_weight += tl.load(partials_ptr + part * N + column, mask=mask, other=0.0)
        if HAS_BIAS:
            grad_bias += tl.load(partials_ptr + (P + part) * N + column, mask=mask, other=0.0)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_WEIGHT:
        total = tl.sum(grad_weight, axis=0).to(grad_weight_ptr.dtype.element_ty)
        tl.store(grad_weight_ptr + column, total, mask=column < N)
    if HAS_BIAS:
        total = tl.sum(grad_bias, axis=0).to(grad_bias_ptr.dtype.element_ty)
        tl.store(grad_bias_ptr + column, total, mask=column < N)
