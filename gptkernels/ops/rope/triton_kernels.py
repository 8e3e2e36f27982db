"""The rotation in Triton: a program has some tokens of some heads, of the queries or of the keys."""

import triton
import triton.language as tl
from torch import Tensor

from ... import hardware
from ...remembered import remembered
from ...torch_library import torch_op
from ...triton_calls import Launch
from .outputs import fwd_outputs
from .record import RopeCall

# Elements of a program's tile: two 16-byte loads of either half by each of 128 threads are under way.
TILE, WARPS = 2048, 4


@triton.jit
def rope_fwd_kernel(
    q_ptr,  # (B, H, T, D)
    k_ptr,  # (B, Hkv, T, D)
    cos_ptr,  # (T, W) or (B, T, W)
    sin_ptr,
    q_out_ptr,  # as q
    k_out_ptr,  # as k
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
    D: tl.constexpr,
    R: tl.constexpr,  # of which are rotated
    WHOLE: tl.constexpr,  # cos and sin have R columns, else R / 2
    INTERLEAVED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,  # of R / 2
    BLOCK_REST: tl.constexpr,  # of D - R
):
    # Heads of a token follow each other: their tables are in a cache, and in memory they are often neighbours.
    if tl.program_id(1) == 0:
        x_ptr, out_ptr, heads, rows = q_ptr, q_out_ptr, q_heads, q_rows
        stride_b, stride_h, stride_t = q_stride_b.to(tl.int64), q_stride_h.to(tl.int64), q_stride_t.to(tl.int64)
        out_b, out_h, out_t = q_out_stride_b.to(tl.int64), q_out_stride_h.to(tl.int64), q_out_stride_t.to(tl.int64)
    else:
        x_ptr, out_ptr, heads, rows = k_ptr, k_out_ptr, k_heads, k_rows
        stride_b, stride_h, stride_t = k_stride_b.to(tl.int64), k_stride_h.to(tl.int64), k_stride_t.to(tl.int64)
        out_b, out_h, out_t = k_out_stride_b.to(tl.int64), k_out_stride_h.to(tl.int64), k_out_stride_t.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    b, t, h = row // heads // tokens, row // heads % tokens, row % heads
    x_ptr += b * stride_b + h * stride_h + t * stride_t
    out_ptr += b * out_b + h * out_h + t * out_t
    cos_ptr += b * cos_stride_b + t * cos_stride_t
    sin_ptr += b * sin_stride_b + t * sin_stride_t

    pair = tl.arange(0, BLOCK_R)[None, :]
    mask = (row < rows) & (pair < R // 2)
    first, second = (2 * pair, 2 * pair + 1) if INTERLEAVED else (pair, pair + R // 2)
    dtype = x_ptr.dtype.element_ty
    x_1 = tl.load(x_ptr + first, mask=mask, other=0.0).to(tl.float32)
    x_2 = tl.load(x_ptr + second, mask=mask, other=0.0).to(tl.float32)
    cos_1 = tl.load(cos_ptr + (first if WHOLE else pair), mask=mask, other=0.0).to(dtype).to(tl.float32)
    sin_1 = tl.load(sin_ptr + (first if WHOLE else pair), mask=mask, other=0.0).to(dtype).to(tl.float32)
    cos_2, sin_2 = cos_1, sin_1
    if WHOLE:
        cos_2 = tl.load(cos_ptr + second, mask=mask, other=0.0).to(dtype).to(tl.float32)
        sin_2 = tl.load(sin_ptr + second, mask=mask, other=0.0).to(dtype).to(tl.float32)
    if TRANSPOSED:
        y_1, y_2 = x_1 * cos_1 + x_2 * sin_2, x_2 * cos_2 - x_1 * sin_1
    else:
        y_1, y_2 = x_1 * cos_1 - x_2 * sin_1, x_2 * cos_2 + x_1 * sin_2
    tl.store(out_ptr + first, y_1.to(dtype), mask=mask)
    tl.store(out_ptr + second, y_2.to(dtype), mask=mask)
    if BLOCK_REST > 0:
        column = R + tl.arange(0, BLOCK_REST)[None, :]
        mask = (row < rows) & (column < D)
        tl.store(out_ptr + column, tl.load(x_ptr + column, mask=mask, other=0.0), mask=mask)


def unsupported(call: RopeCall) -> str | None:
    return hardware.triton_unsupported(call.q.device)


@torch_op(fake=fwd_outputs)
def rope_fwd(call: RopeCall) -> tuple[Tensor, Tensor]:
    """-> q, k rotated, in their memory order"""
    q, k = fwd_outputs(call)
    if q.numel() + k.numel() == 0:
        return q, k
    launch = fwd_launch(call, outputs=(q, k))
    with hardware.on_device(q.device):
        launch(call.q, call.k, call.cos, call.sin, q, k)
    return q, k


@remembered
def fwd_launch(call: RopeCall, outputs: tuple[Tensor, Tensor]) -> Launch:
    q, k, size, rotated = call.q, call.k, call.q.shape[-1], call.rotated
    rows = [x.shape[0] * x.shape[1] * x.shape[2] for x in (q, k)]
    block, rest = triton.next_power_of_2(rotated // 2), size - rotated
    through = triton.next_power_of_2(rest) if rest else 0
    together = max(1, TILE // max(2 * block, through))
    steps = [step for x in (q, k, *outputs) for step in x.stride()[:3]]
    steps += [step for t in (call.cos, call.sin) for step in (0 if t.ndim == 2 else t.stride(0), t.stride(-2))]
    return Launch(
        rope_fwd_kernel,
        (triton.cdiv(max(rows), together), 2),
        (q.shape[1], k.shape[1], q.shape[2], *rows, *steps),
        D=size,
        R=rotated,
        WHOLE=call.cos.shape[-1] == rotated,
        INTERLEAVED=call.interleaved,
        TRANSPOSED=call.transposed,
        ROWS=together,
        BLOCK_R=block,
        BLOCK_REST=through,
        num_warps=WARPS,
    )
