"""Matrix products in Triton whose epilogues do the rest of the MLP: persistent, TMA where there is one."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2_PI = tl.constexpr(0.3989422804014327)
CUBIC = tl.constexpr(0.044715)
GPT_OSS_LIMIT = tl.constexpr(7.0)
GPT_OSS_SHARPNESS = tl.constexpr(1.702)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2_E))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """x: float32"""
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is sigmoid(2 u)
        return x * sigmoid(2.0 * SQRT_2_OVER_PI * x * (1.0 + CUBIC * x * x))
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x)
    elif ACTIVATION == "relu2":
        return tl.where(x < 0.0, 0.0, x * x)
    elif ACTIVATION == "silu":
        return x * sigmoid(x)
    else:
        return x


@triton.jit
def activate_and_slope(x, ACTIVATION: tl.constexpr):
    """x: float32 -> activation(x), activation'(x)"""
    if ACTIVATION == "gelu_tanh":
        s = sigmoid(2.0 * SQRT_2_OVER_PI * x * (1.0 + CUBIC * x * x))
        inner = 2.0 * SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x)
        return x * s, s + x * s * (1.0 - s) * inner
    elif ACTIVATION == "gelu":
        phi = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
        return x * phi, phi + x * INV_SQRT_2_PI * tl.exp2(-0.5 * LOG2_E * x * x)
    elif ACTIVATION == "relu":
        return tl.where(x < 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "relu2":
        return tl.where(x < 0.0, 0.0, x * x), tl.where(x < 0.0, 0.0, 2.0 * x)
    else:
        s = sigmoid(x)
        return x * s, s * (1.0 + x * (1.0 - s))


@triton.jit
def gated_and_slopes(gate, up, ACTIVATION: tl.constexpr):
    """gate, up: float32 -> activation(gate) * up and its derivatives by gate and up"""
    if ACTIVATION == "gpt_oss":
        # Comparisons that keep NaNs, as torch.clamp does.
        g = tl.where(gate > GPT_OSS_LIMIT, GPT_OSS_LIMIT, gate)
        u = 1.0 + tl.where(up > GPT_OSS_LIMIT, GPT_OSS_LIMIT, tl.where(up < -GPT_OSS_LIMIT, -GPT_OSS_LIMIT, up))
        s = sigmoid(GPT_OSS_SHARPNESS * g)
        act, slope = g * s, s * (1.0 + GPT_OSS_SHARPNESS * g * (1.0 - s))
        inside = (up >= -GPT_OSS_LIMIT) & (up <= GPT_OSS_LIMIT)
        return act * u, tl.where(gate <= GPT_OSS_LIMIT, slope * u, 0.0), tl.where(inside, act, 0.0)
    else:
        act, slope = activate_and_slope(gate, ACTIVATION)
        return act * up, slope * up, act


@triton.jit
def load_tile(
    source,  # (rows, columns): a TMA descriptor, or a pointer to rows `stride` apart
    row,
    column,
    rows,
    columns,
    stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """-> (BLOCK_ROWS, BLOCK_COLUMNS) from (row, column) on, zeros outside"""
    if TMA:
        return source.load([row, column])
    else:
        r = row + tl.arange(0, BLOCK_ROWS)
        c = column + tl.arange(0, BLOCK_COLUMNS)
        mask = (r < rows)[:, None] & (c < columns)[None, :]
        return tl.load(source + r.to(tl.int64)[:, None] * stride + c[None, :], mask=mask, other=0.0)


@triton.jit
def tile_corner(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """-> row and column of a tile. GROUP_M tiles below each other come first, so that their operands stay in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_in_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first_m = tile // tiles_in_group * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    return (first_m + tile % group_m) * BLOCK_M, tile % tiles_in_group // group_m * BLOCK_N


@triton.jit
def product_tile(
    a,  # (M, K)
    b,  # (N, K), or (K, N) unless B_ROWS_ARE_N
    other,  # like b, or unused
    m,
    n,
    M,
    N,
    K,
    a_stride,
    b_stride,
    other_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    B_ROWS_ARE_N: tl.constexpr,
    TWO: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """-> (BLOCK_M, BLOCK_N) of a @ b at (m, n), float32; with TWO the second is that of a @ other"""
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    second = total
    for k in range(0, K, BLOCK_K):
        a_tile = load_tile(a, m, k, M, K, a_stride, BLOCK_M, BLOCK_K, TMA)
        if B_ROWS_ARE_N:
            b_tile = load_tile(b, n, k, N, K, b_stride, BLOCK_N, BLOCK_K, TMA).T
        else:
            b_tile = load_tile(b, k, n, K, N, b_stride, BLOCK_K, BLOCK_N, TMA)
        total = tl.dot(a_tile, b_tile, total, input_precision=PRECISION)
        if TWO:
            other_tile = load_tile(other, n, k, N, K, other_stride, BLOCK_N, BLOCK_K, TMA).T
            second = tl.dot(a_tile, other_tile, second, input_precision=PRECISION)
    return total, second


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) -> its left and right halves. An epilogue of a quarter tile at a time needs fewer registers."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def mlp_fwd_epilogue(
    total,  # (BLOCK_M, BLOCK_N) float32: x @ weight.T at (m, n)
    second,  # likewise of up_weight
    m,
    n,
    M,
    N,
    bias_ptr,
    up_bias_ptr,
    residual_ptr,
    preact_ptr,
    up_ptr,
    out_ptr,
    residual_stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_PREACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = (m + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    column = (n + tl.arange(0, BLOCK_N))[None, :]
    mask = (row < M) & (column < N)
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    if HAS_UP_BIAS:
        second += tl.load(up_bias_ptr + column, mask=column < N, other=0.0).to(tl.float32)
    if HAS_PREACT:
        tl.store(preact_ptr + row * N + column, total.to(preact_ptr.dtype.element_ty), mask=mask)
        if GATED:
            tl.store(up_ptr + row * N + column, second.to(up_ptr.dtype.element_ty), mask=mask)
    if GATED:
        out = gated_and_slopes(total, second, ACTIVATION)[0]
    else:
        out = activate(total, ACTIVATION)
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + row * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def mlp_fwd_kernel(
    x,  # (M, K)
    weight,  # (N, K)
    up_weight,  # (N, K), with GATED
    bias_ptr,  # (N,) or unused
    up_bias_ptr,  # (N,) or unused
    residual_ptr,  # (M, N), rows residual_stride apart, or unused
    preact_ptr,  # (M, N) or unused: x @ weight.T + bias
    up_ptr,  # (M, N) or unused: x @ up_weight.T + up_bias
    out_ptr,  # (M, N): activation(preact) (with GATED: * up) + residual
    M,
    N,
    K,
    x_stride,
    weight_stride,
    up_stride,
    residual_stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_PREACT: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        m, n = tile_corner(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        total, second = product_tile(
            x, weight, up_weight, m, n, M, N, K, x_stride, weight_stride, up_stride, BLOCK_M, BLOCK_N, BLOCK_K, True,
            GATED, TMA, PRECISION,
        )  # fmt: skip
        for half in tl.static_range(2):
            part, other = halves(total, BLOCK_M, BLOCK_N)[half], halves(second, BLOCK_M, BLOCK_N)[half]
            for quarter in tl.static_range(2):
                mlp_fwd_epilogue(
                    halves(part, BLOCK_M, BLOCK_N // 2)[quarter], halves(other, BLOCK_M, BLOCK_N // 2)[quarter],
                    m, n + (2 * half + quarter) * (BLOCK_N // 4), M, N, bias_ptr, up_bias_ptr, residual_ptr,
                    preact_ptr, up_ptr, out_ptr, residual_stride, ACTIVATION, GATED, HAS_BIAS, HAS_UP_BIAS,
                    HAS_RESIDUAL, HAS_PREACT, BLOCK_M, BLOCK_N // 4,
                )  # fmt: skip


@triton.jit
def store_sums(grad, partials_ptr, n, N, BLOCK_N: tl.constexpr):
    """grad: (BLOCK_M, BLOCK_N), as it was stored"""
    column = n + tl.arange(0, BLOCK_N)
    tl.store(partials_ptr + column, tl.sum(grad.to(tl.float32), axis=0), mask=column < N)


@triton.jit
def mlp_bwd_epilogue(
    total,  # (BLOCK_M, BLOCK_N) float32: dout @ weight at (m, n)
    m,
    n,
    M,
    N,
    preact_ptr,
    up_ptr,
    act_ptr,
    grad_ptr,
    up_grad_ptr,
    partials_ptr,  # (N,): of this tile's rows
    up_partials_ptr,  # likewise
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_ACT: tl.constexpr,
    HAS_PARTIALS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = (m + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    column = (n + tl.arange(0, BLOCK_N))[None, :]
    mask = (row < M) & (column < N)
    index = row * N + column
    preact = tl.load(preact_ptr + index, mask=mask, other=0.0).to(tl.float32)
    # Rounded first, so that the bias's gradient is the sum of the very numbers that the others are made from.
    if GATED:
        up = tl.load(up_ptr + index, mask=mask, other=0.0).to(tl.float32)
        act, slope, up_slope = gated_and_slopes(preact, up, ACTIVATION)
        up_grad = (total * up_slope).to(up_grad_ptr.dtype.element_ty)
        tl.store(up_grad_ptr + index, up_grad, mask=mask)
        if HAS_PARTIALS:
            store_sums(up_grad, up_partials_ptr, n, N, BLOCK_N)
    else:
        act, slope = activate_and_slope(preact, ACTIVATION)
    if HAS_ACT:
        tl.store(act_ptr + index, act.to(act_ptr.dtype.element_ty), mask=mask)
    grad = (total * slope).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + index, grad, mask=mask)
    if HAS_PARTIALS:
        store_sums(grad, partials_ptr, n, N, BLOCK_N)


@triton.jit
def mlp_bwd_kernel(
    dout,  # (M, K)
    weight,  # (K, N)
    preact_ptr,  # (M, N)
    up_ptr,  # (M, N), with GATED
    act_ptr,  # (M, N) or unused: activation(preact) (with GATED: * up), once more
    grad_ptr,  # (M, N): dout @ weight * activation'(preact) (with GATED: * up)
    up_grad_ptr,  # (M, N), with GATED: dout @ weight * activation(preact)
    partials_ptr,  # (tiles along M, N) float32 or unused: column sums of grad over each tile's rows; GATED: 2 of them
    M,
    N,
    K,
    dout_stride,
    weight_stride,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_ACT: tl.constexpr,
    HAS_PARTIALS: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    for tile in range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        m, n = tile_corner(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        total, _ = product_tile(
            dout, weight, weight, m, n, M, N, K, dout_stride, weight_stride, weight_stride, BLOCK_M, BLOCK_N, BLOCK_K,
            False, False, TMA, PRECISION,
        )  # fmt: skip
        partials = partials_ptr + (m // BLOCK_M).to(tl.int64) * N
        up_partials = partials_ptr + (m // BLOCK_M + tl.cdiv(M, BLOCK_M)).to(tl.int64) * N
        for half in tl.static_range(2):
            part = halves(total, BLOCK_M, BLOCK_N)[half]
            if GATED:
                for quarter in tl.static_range(2):
                    mlp_bwd_epilogue(
                        halves(part, BLOCK_M, BLOCK_N // 2)[quarter], m, n + (2 * half + quarter) * (BLOCK_N // 4), M,
                        N, preact_ptr, up_ptr, act_ptr, grad_ptr, up_grad_ptr, partials, up_partials, ACTIVATION,
                        GATED, HAS_ACT, HAS_PARTIALS, BLOCK_M, BLOCK_N // 4,
                    )  # fmt: skip
            else:
                mlp_bwd_epilogue(
                    part, m, n + half * (BLOCK_N // 2), M, N, preact_ptr, up_ptr, act_ptr, grad_ptr, up_grad_ptr,
                    partials, up_partials, ACTIVATION, GATED, HAS_ACT, HAS_PARTIALS, BLOCK_M, BLOCK_N // 2,
                )  # fmt: skip
