"""LayerNorm in Triton: a row in registers, one pass over memory each way; rows that do not fit are read again."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import hardware
from ...remembered import remembered
from ...torch_library import torch_op
from ...triton_calls import Launch
from ...tuning import choices
from ..dropout import threshold
from ..triton_dropout import kept
from .outputs import bwd_outputs, fwd_outputs
from .record import NormCall


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
def normalise(h, mean, rstd, weight_ptr, bias_ptr, column, column_mask, HAS_BIAS: tl.constexpr):
    """h: (ROWS, BLOCK), mean, rstd: (ROWS, 1) -> (ROWS, BLOCK) float32"""
    y = (h - mean) * rstd * tl.load(weight_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def layer_norm_fwd_kernel(
    x_ptr,  # (M, N), rows x_stride apart
    residual_ptr,  # (M, N), rows residual_stride apart, or unused
    weight_ptr,  # (N,)
    bias_ptr,  # (N,) or unused
    seed_ptr,  # (1,) int64 or unused
    y_ptr,  # (M, N)
    h_ptr,  # (M, N) or unused
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    M,
    N,
    x_stride,
    residual_stride,
    eps,
    drop_below,
    keep_scale,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE_ROW: tl.constexpr,  # BLOCK >= N: the row stays in registers
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    row_mask = row < M
    lane = tl.arange(0, BLOCK)[None, :]
    x_ptr += row * x_stride
    residual_ptr += row * residual_stride
    y_ptr += row * N
    h_ptr += row * N

    if WHOLE_ROW:
        mask = row_mask & (lane < N)
        h = add_residual(
            x_ptr, residual_ptr, h_ptr, seed_ptr, row, lane, mask, drop_below, keep_scale, HAS_RESIDUAL, HAS_DROPOUT
        )
        mean = tl.sum(h, axis=1)[:, None] / N
        centred = tl.where(mask, h - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / N + eps)
        y = normalise(h, mean, rstd, weight_ptr, bias_ptr, lane, lane < N, HAS_BIAS)
        tl.store(y_ptr + lane, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        source_ptr = h_ptr if HAS_RESIDUAL else x_ptr
        partial = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for start in range(0, N, BLOCK):
            column = start + lane
            mask = row_mask & (column < N)
            partial += add_residual(
                x_ptr, residual_ptr, h_ptr, seed_ptr, row, column, mask, drop_below, keep_scale, HAS_RESIDUAL,
                HAS_DROPOUT,
            )  # fmt: skip
        mean = tl.sum(partial, axis=1)[:, None] / N
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
            y = normalise(h, mean, rstd, weight_ptr, bias_ptr, column, column < N, HAS_BIAS)
            tl.store(y_ptr + column, y.to(y_ptr.dtype.element_ty), mask=mask)

    tl.store(mean_ptr + row, mean, mask=row_mask)
    tl.store(rstd_ptr + row, rstd, mask=row_mask)


@triton.jit
def x_hat_and_weighted_dy(dy_ptr, h_ptr, weight_ptr, mean, rstd, column, mask, column_mask):
    """-> dy, x_hat, dy * weight: (ROWS, BLOCK) float32, zero outside of the rows"""
    dy = tl.load(dy_ptr + column, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + column, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column_mask, other=0.0).to(tl.float32)
    return dy, tl.where(mask, (h - mean) * rstd, 0.0), dy * weight


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
    weight_ptr,  # (N,)
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    seed_ptr,  # (1,) int64 or unused
    grad_h_ptr,  # (M, N)
    grad_x_ptr,  # (M, N) or unused
    partials_ptr,  # (2, programs, N) float32 or unused: this program's share of the weight's and the bias's gradient
    M,
    N,
    dy_stride,
    dh_stride,
    h_stride,
    drop_below,
    keep_scale,
    HAS_DH: tl.constexpr,
    HAS_GRAD_X: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_PARTIALS: tl.constexpr,
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
        mean = tl.load(mean_ptr + row, mask=row_mask, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row_mask, other=0.0)
        dy_row = dy_ptr + row * dy_stride
        h_row = h_ptr + row * h_stride
        dh_row = dh_ptr + row * dh_stride
        grad_h_row = grad_h_ptr + row * N
        grad_x_row = grad_x_ptr + row * N

        if WHOLE_ROW:
            mask = row_mask & (lane < N)
            dy, x_hat, wdy = x_hat_and_weighted_dy(dy_row, h_row, weight_ptr, mean, rstd, lane, mask, lane < N)
            if HAS_PARTIALS:
                grad_weight += dy * x_hat
                grad_bias += dy
            along_x_hat = tl.sum(wdy * x_hat, axis=1)[:, None] / N
            along_one = tl.sum(wdy, axis=1)[:, None] / N
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
                dy, x_hat, wdy = x_hat_and_weighted_dy(dy_row, h_row, weight_ptr, mean, rstd, column, mask, column < N)
                sum_x_hat += wdy * x_hat
                sum_one += wdy
            along_x_hat = tl.sum(sum_x_hat, axis=1)[:, None] / N
            along_one = tl.sum(sum_one, axis=1)[:, None] / N
            for start in range(0, N, BLOCK):
                column = start + lane
                mask = row_mask & (column < N)
                dy, x_hat, wdy = x_hat_and_weighted_dy(dy_row, h_row, weight_ptr, mean, rstd, column, mask, column < N)
                if HAS_PARTIALS:
                    # No other program touches this row of partials; it starts out as zeros.
                    accumulate(weight_partial_ptr, dy * x_hat, column, N)
                    accumulate(bias_partial_ptr, dy, column, N)
                grad_h = (wdy - x_hat * along_x_hat - along_one) * rstd
                store_grad_x(
                    grad_h, dh_row, grad_h_row, grad_x_row, seed_ptr, row, column, mask, drop_below, keep_scale, HAS_DH,
                    HAS_GRAD_X, HAS_DROPOUT,
                )  # fmt: skip

    if HAS_PARTIALS and WHOLE_ROW:
        column = tl.arange(0, BLOCK)
        tl.store(weight_partial_ptr + column, tl.sum(grad_weight, axis=0), mask=column < N)
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


# Longest row -> (ROWS, BLOCK, num_warps); BLOCK 0: the row's power of two.
# The last row of each serves longer rows still, BLOCK columns at a time. Chosen for registers without spills;
# `gptkernels tune` finds better ones on the GPU at hand.
FWD_LAUNCH = {128: (8, 0, 4), 256: (4, 0, 4), 512: (2, 0, 4), 1024: (1, 0, 4), 2048: (1, 0, 4), 4096: (1, 0, 8),
              8192: (1, 0, 8), 16384: (1, 0, 16), 65536: (1, 8192, 16)}  # fmt: skip
BWD_LAUNCH = {128: (8, 0, 4), 256: (4, 0, 4), 512: (1, 0, 4), 1024: (1, 0, 4), 2048: (1, 0, 8), 4096: (1, 0, 8),
              8192: (1, 0, 16), 65536: (1, 4096, 16)}  # fmt: skip
# Philox does not fit into the registers beside a row of 8192.
BWD_DROPOUT_LAUNCH = {longest: row for longest, row in BWD_LAUNCH.items() if longest != 8192}
REDUCE_LAUNCH = {"BLOCK_P": 32, "BLOCK_N": 64, "num_warps": 8}
MAX_COLUMNS = 65536


def launch_row(table: dict, columns: int, setting: str, op: str, x: Tensor) -> dict:
    """x: (M, N)"""
    usual = next(row for longest, row in table.items() if columns <= longest)
    rows, block, warps = choices.setting(setting, op, NormCall(x, None, x, None, 1.0, 0.0), usual)
    whole_row = block == 0
    return {
        "ROWS": rows,
        "BLOCK": triton.next_power_of_2(columns) if whole_row else block,
        "WHOLE_ROW": whole_row,
        "num_warps": warps,
    }


def unsupported(call: NormCall) -> str | None:
    x = call.x
    if x.shape[-1] > MAX_COLUMNS:
        return f"takes rows of up to {MAX_COLUMNS} elements, not {x.shape[-1]}"
    return hardware.triton_unsupported(x.device)


@torch_op(fake=fwd_outputs)
def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual: (M, N), weight, bias: (N,), seed: (1,) -> y, h = dropout(x) + residual: (M, N), mean, rstd: (M,)"""
    outputs = y, h, mean, rstd = fwd_outputs(x, residual, weight, bias, seed, eps, dropout)
    if x.shape[0] == 0:
        return outputs
    launch = fwd_launch(x, residual, weight, bias, eps, dropout)
    with hardware.on_device(x.device):
        launch(
            x,
            x if residual is None else residual,
            weight,
            weight if bias is None else bias,
            mean if seed is None else seed,
            y,
            h,
            mean,
            rstd,
        )
    return outputs


@remembered
def fwd_launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dropout: float
) -> Launch:
    rows, columns = x.shape
    row = launch_row(FWD_LAUNCH, columns, "layer_norm_fwd", "layer_norm" if residual is None else "add_layer_norm", x)
    residual_stride = 0 if residual is None else residual.stride(0)
    return Launch(
        layer_norm_fwd_kernel,
        (triton.cdiv(rows, row["ROWS"]),),
        (rows, columns, x.stride(0), residual_stride, eps, threshold(dropout), 1 / (1 - dropout)),
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        HAS_DROPOUT=dropout > 0,
        **row,
    )


@torch_op(fake=bwd_outputs)
def layer_norm_bwd(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout: float,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy, dh, h: (M, N), weight: (N,), mean, rstd: (M,) -> gradients of h, x: (M, N), weight, bias: (N,)"""
    outputs = grad_h, grad_x, grad_weight, grad_bias = bwd_outputs(
        dy, dh, h, weight, mean, rstd, seed, dropout, weight_grad, bias_grad
    )
    if h.shape[0] == 0:
        grad_weight.zero_(), grad_bias.zero_()
        return outputs
    launch, reduce, partials_shape = bwd_launches(dy, dh, h, weight, dropout, weight_grad, bias_grad)
    allocate = torch.empty if launch.constants["WHOLE_ROW"] else torch.zeros
    partials = allocate(partials_shape, dtype=torch.float32, device=h.device)
    with hardware.on_device(h.device):
        launch(
            dy,
            dy if dh is None else dh,
            h,
            weight,
            mean,
            rstd,
            mean if seed is None else seed,
            grad_h,
            grad_x,
            partials,
        )
        if weight_grad or bias_grad:
            reduce(partials, grad_weight, grad_bias)
    return outputs


@remembered
def bwd_launches(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, dropout: float, weight_grad: bool, bias_grad: bool
) -> tuple[Launch, Launch, tuple[int, ...]]:
    """-> of the gradients and of the sum over the programs' partial ones, and the shape of those"""
    rows, columns = h.shape
    op = "layer_norm" if dh is None else "add_layer_norm"
    row = launch_row(BWD_DROPOUT_LAUNCH if dropout else BWD_LAUNCH, columns, "layer_norm_bwd", op, h)
    programs = min(triton.cdiv(rows, row["ROWS"]), 4 * hardware.sm_count(h.device))
    has_partials = weight_grad or bias_grad
    dh_stride = 0 if dh is None else dh.stride(0)
    gradients = Launch(
        layer_norm_bwd_kernel,
        (programs,),
        (rows, columns, dy.stride(0), dh_stride, h.stride(0), threshold(dropout), 1 / (1 - dropout)),
        HAS_DH=dh is not None,
        HAS_GRAD_X=dropout > 0 or dy.dtype != h.dtype,
        HAS_DROPOUT=dropout > 0,
        HAS_PARTIALS=has_partials,
        **row,
    )
    reduce = Launch(
        layer_norm_bwd_reduce_kernel,
        (triton.cdiv(columns, REDUCE_LAUNCH["BLOCK_N"]),),
        (programs, columns),
        HAS_WEIGHT=weight_grad,
        HAS_BIAS=bias_grad,
        **REDUCE_LAUNCH,
    )
    return gradients, reduce, (2, programs, columns) if has_partials else (0,)
