"""The pointwise half of the MLP, for where cuBLAS does the products: one pass over the hidden layer each way."""

import triton
import triton.language as tl

from .triton_gemm import activate, activate_and_slope, gated_and_slopes


@triton.jit
def activation_fwd_kernel(
    preact_ptr,  # (size,)
    up_ptr,  # (size,), with GATED
    act_ptr,  # (size,): activation(preact), with GATED times up
    size,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    preact = tl.load(preact_ptr + index, mask=index < size, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(up_ptr + index, mask=index < size, other=0.0).to(tl.float32)
        act = gated_and_slopes(preact, up, ACTIVATION)[0]
    else:
        act = activate(preact, ACTIVATION)
    tl.store(act_ptr + index, act.to(act_ptr.dtype.element_ty), mask=index < size)


@triton.jit
def activation_bwd_kernel(
    grad_ptr,  # (M, N): of the activation's output, or the product's; becomes that of the activation's input
    preact_ptr,  # (M, N)
    up_ptr,  # (M, N), with GATED
    act_ptr,  # (M, N) or unused: activation(preact) (with GATED: * up), once more
    up_grad_ptr,  # (M, N), with GATED
    partials_ptr,  # (row blocks, N) float32 or unused: column sums of the new grad; GATED: 2 of them
    M,
    N,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_ACT: tl.constexpr,
    HAS_PARTIALS: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a program's block of columns, BLOCK_M at a time
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    column = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up_sums = sums
    for start in range(0, ROWS, BLOCK_M):
        row = (tl.program_id(0).to(tl.int64) * ROWS + start + tl.arange(0, BLOCK_M))[:, None]
        mask = (row < M) & (column < N)
        index = row * N + column
        grad = tl.load(grad_ptr + index, mask=mask, other=0.0).to(tl.float32)
        preact = tl.load(preact_ptr + index, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(up_ptr + index, mask=mask, other=0.0).to(tl.float32)
            act, slope, up_slope = gated_and_slopes(preact, up, ACTIVATION)
            up_rounded = (grad * up_slope).to(up_grad_ptr.dtype.element_ty)
            tl.store(up_grad_ptr + index, up_rounded, mask=mask)
            up_sums += up_rounded.to(tl.float32)
        else:
            act, slope = activate_and_slope(preact, ACTIVATION)
        rounded = (grad * slope).to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + index, rounded, mask=mask)
        if HAS_ACT:
            tl.store(act_ptr + index, act.to(act_ptr.dtype.element_ty), mask=mask)
        sums += rounded.to(tl.float32)
    if HAS_PARTIALS:
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        partials = partials_ptr + tl.program_id(0).to(tl.int64) * N + column
        tl.store(partials, tl.sum(sums, axis=0), mask=column < N)
        if GATED:
            tl.store(partials + tl.num_programs(0).to(tl.int64) * N, tl.sum(up_sums, axis=0), mask=column < N)
