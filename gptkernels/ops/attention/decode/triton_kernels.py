"""Decoding in Triton: the keys of a row are split among programs, whose results a second kernel combines."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .... import hardware
from ....launch import shipped
from ....remembered import remembered
from ....torch_library import torch_op
from ....triton_calls import Launch
from ....tuning import choices
from ..outputs import decode_outputs
from ..record import DecodeCall
from ..triton_blocks import add_weighted, inner_products, zeros_head
from ..triton_launch import head_parts

LOG2E = 1.4426950408889634
LOG2E_ = tl.constexpr(LOG2E)


@triton.jit
def load_rows(
    ptr,  # (..., D)
    offsets,  # (ROWS,) int64, where rows start
    mask,  # (ROWS,)
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
):
    """-> (ROWS, D1), (ROWS, D2), zeros where not mask"""
    column = tl.arange(0, D1)[None, :]
    part1 = tl.load(ptr + offsets[:, None] + column, mask=mask[:, None] & (column < D), other=0.0)
    part2 = part1
    if D2 > 0:
        column = D1 + tl.arange(0, D2)[None, :]
        part2 = tl.load(ptr + offsets[:, None] + column, mask=mask[:, None] & (column < D), other=0.0)
    return part1, part2


@triton.jit
def store_rows(ptr, offsets, mask, part1, part2, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """offsets, mask: (ROWS,), part1: (ROWS, D1), part2: (ROWS, D2)"""
    column = tl.arange(0, D1)[None, :]
    element = ptr.dtype.element_ty
    tl.store(ptr + offsets[:, None] + column, part1.to(element), mask=mask[:, None] & (column < D))
    if D2 > 0:
        column = D1 + tl.arange(0, D2)[None, :]
        tl.store(ptr + offsets[:, None] + column, part2.to(element), mask=mask[:, None] & (column < D))


# A window that hides no key
UNBOUNDED = tl.constexpr(1 << 30)


SIZES = ["batch", "heads", "group", "tokens", "capacity", "window", "pages", "page", "table_stride"]


# One kernel serves every batch, number of tokens, capacity and window: none of them is waited for in a conversation.
@triton.jit(do_not_specialize=SIZES)
def decode_attention_fwd_kernel(
    q_ptr,  # (B, H, Tq, D)
    k_ptr,  # (B, Hkv, capacity, D), or (pages, Hkv, page, D)
    v_ptr,  # as k
    lengths_ptr,  # (B,) int32
    table_ptr,  # (B, pages of a row) int32 or unused
    start_ptr,  # (B,) int32 or unused
    sinks_ptr,  # (H,) or unused
    out_ptr,  # (B, H, Tq, D), written with one split
    parts_ptr,  # (splits, B, H, Tq, D) float32, each split's own result, written with several
    lse_ptr,  # (splits, B, H, Tq) float32, in base 2, written with several
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
    batch,
    heads,
    group,
    tokens,
    capacity,  # of a row
    window,  # UNBOUNDED: none
    pages,
    page,
    table_stride,
    scale,  # times log2(e), or with a softcap divided by it
    softcap,  # times log2(e)
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    CAUSAL: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    split, splits = tl.program_id(1), tl.num_programs(1)
    kv_heads = heads // group
    b, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    # Rows are the tokens of all heads that share these keys.
    row = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < group * tokens
    head, token = kv_head * group + row // tokens, row % tokens
    length = tl.maximum(tl.load(lengths_ptr + b), 0)
    if PAGED or window == UNBOUNDED:
        length = tl.minimum(length, capacity)
    position = length - tokens + token

    first = tl.maximum(length - tokens - window + 1, 0)
    if HAS_START:
        first = tl.minimum(tl.maximum(first, tl.load(start_ptr + b)), length)
    # Each split takes the same number of whole blocks.
    share = tl.cdiv(tl.cdiv(length - first, BLOCK_N), splits) * BLOCK_N
    start = first + split * share
    stop = tl.minimum(start + share, length)

    q1, q2 = load_rows(q_ptr, b * q_stride_b + head * q_stride_h + token * q_stride_t, in_rows, D, D1, D2)
    sum1, sum2 = zeros_head(BLOCK_M, D1, D2)
    peak = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    k_ptr += kv_head * k_stride_h
    v_ptr += kv_head * v_stride_h
    for block in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        key = block + tl.arange(0, BLOCK_N)
        if PAGED:
            outer = tl.load(table_ptr + b * table_stride + key // page, mask=key < stop, other=0)
            outer = tl.minimum(tl.maximum(outer, 0), pages - 1).to(tl.int64)
            slot = (key % page).to(tl.int64)
        else:
            outer, slot = b, (key % capacity).to(tl.int64)
        k1, k2 = load_rows(k_ptr, outer * k_stride_b + slot * k_stride_t, key < stop, D, D1, D2)
        scores = inner_products(q1, q2, k1, k2, D2)
        factor = scale
        if CAPPED:
            scores = libdevice.tanh(scores * scale)
            factor = softcap
        distance = position[:, None] - key[None, :]
        seen = (key < stop)[None, :] & (distance < window)
        if CAUSAL:
            seen = seen & (distance >= 0)
        else:
            seen = seen & (distance > -window)
        scores = tl.where(seen, scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1) * factor)
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weights = tl.exp2(scores * factor - shift[:, None])
        correction = tl.exp2(peak - shift)
        total = total * correction + tl.sum(weights, 1)
        v1, v2 = load_rows(v_ptr, outer * v_stride_b + slot * v_stride_t, key < stop, D, D1, D2)
        sum1 = sum1 * correction[:, None]
        if D2 > 0:
            sum2 = sum2 * correction[:, None]
        sum1, sum2 = add_weighted(sum1, sum2, weights, v1, v2, D2)
        peak = new_peak

    sees_any = total != 0
    whole = tl.where(sees_any, total, 1.0)
    if HAS_SINKS and splits == 1:
        whole += share_of_sink(sinks_ptr, head, in_rows, peak)
    inverse = 1 / whole
    sum1 = sum1 * inverse[:, None]
    if D2 > 0:
        sum2 = sum2 * inverse[:, None]
    if splits == 1:
        offsets = b * out_stride_b + head * out_stride_h + token * out_stride_t
        store_rows(out_ptr, offsets, in_rows, sum1, sum2, D, D1, D2)
    else:
        part = ((split.to(tl.int64) * batch + b) * heads + head) * tokens + token
        store_rows(parts_ptr, part * D, in_rows, sum1, sum2, D, D1, D2)
        lse = tl.where(sees_any, peak + tl.log2(total), -float("inf"))
        tl.store(lse_ptr + part, lse, mask=in_rows)


@triton.jit
def share_of_sink(sinks_ptr, head, mask, peak):
    """head, mask, peak: (ROWS,) or one -> what a head's sink adds to a sum of powers of 2 over that peak"""
    sink = tl.load(sinks_ptr + head, mask=mask, other=-float("inf")).to(tl.float32) * LOG2E_
    # Where no key is seen, all is zero whatever the sink.
    return tl.where(peak == -float("inf"), 0.0, tl.exp2(sink - peak))


@triton.jit(do_not_specialize=["rows", "heads", "tokens", "splits"])
def decode_attention_combine_kernel(
    parts_ptr,  # (splits, B * H * Tq, D) float32
    lse_ptr,  # (splits, B * H * Tq) float32, in base 2
    out_ptr,  # (B, H, Tq, D)
    sinks_ptr,  # (H,) or unused
    out_stride_b,
    out_stride_h,
    out_stride_t,
    rows,
    heads,
    tokens,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK_D)[None, :]
    split = tl.arange(0, BLOCK_SPLITS)
    lse = tl.load(lse_ptr + split.to(tl.int64) * rows + row, mask=split < splits, other=-float("inf"))
    peak = tl.max(lse, 0)
    share = tl.exp2(lse - tl.where(peak == -float("inf"), 0.0, peak))
    total = tl.sum(share, 0)
    b, h, t = row // (heads * tokens), row // tokens % heads, row % tokens
    if HAS_SINKS:
        total += share_of_sink(sinks_ptr, h, True, peak)
    share = share / tl.where(total == 0, 1.0, total)
    # Splits without keys wrote zeros.
    offsets = (split.to(tl.int64) * rows + row)[:, None] * D + column
    parts = tl.load(parts_ptr + offsets, mask=(split < splits)[:, None] & (column < D), other=0.0)
    out = tl.sum(parts * share[:, None], 0)[None, :]
    out_ptr += b.to(tl.int64) * out_stride_b + h.to(tl.int64) * out_stride_h + t.to(tl.int64) * out_stride_t
    tl.store(out_ptr + column, out.to(out_ptr.dtype.element_ty), mask=column < D)


def unsupported(call: DecodeCall) -> str | None:
    return hardware.triton_unsupported(call.q.device)


MAX_ROWS = 32
MAX_SPLITS = 64


@torch_op(fake=decode_outputs)
def decode_attention_fwd(call: DecodeCall) -> Tensor:
    """-> out: as q"""
    q, k_cache, v_cache = call.q, call.k_cache, call.v_cache
    out = decode_outputs(call)
    if call.capacity == 0 or out.numel() == 0:
        return out.zero_()
    fwd, combine, splits = launches(call, out=out)
    if splits == 1:
        parts = lse = torch.empty((0,), dtype=torch.float32, device=q.device)
    else:
        parts = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
        lse = torch.empty((splits, *q.shape[:3]), dtype=torch.float32, device=q.device)
    with hardware.on_device(q.device):
        # What not every call has: with lengths in its place, which are then not read for it
        table, start, sinks = (call.lengths if x is None else x for x in (call.block_table, call.key_start, call.sinks))
        fwd(q, k_cache, v_cache, call.lengths, table, start, sinks, out, parts, lse)
        if splits > 1:
            combine(parts, lse, out, sinks)
    return out


@remembered
def launches(call: DecodeCall, out: Tensor) -> tuple[Launch, Launch, int]:
    """-> of the splits of each row and of what combines them, the number of splits"""
    q, k_cache, v_cache, window = call.q, call.k_cache, call.v_cache, call.window
    (batch, heads, tokens, head_size), (pages, kv_heads, page, _) = q.shape, k_cache.shape
    capacity = call.capacity
    group = heads // kv_heads
    d1, d2 = head_parts(head_size, q.element_size())
    table = "decode_row_float32" if q.element_size() == 4 else "decode_row"
    usual = shipped(hardware.arch(q.device))[table][triton.next_power_of_2(head_size)]
    block_n, warps, stages = choices.setting("decode_row", "decode_attention", call, usual)
    block_m = max(16, min(MAX_ROWS, triton.next_power_of_2(group)))
    row_tiles = triton.cdiv(group * tokens, block_m)
    # Lengths stay on the device: as many splits as the most keys there can be, and a full GPU, give work to.
    reach = capacity if window is None else min(capacity, window + tokens - 1)
    wanted = triton.cdiv(2 * hardware.sm_count(q.device), batch * kv_heads * row_tiles)
    splits = max(1, min(wanted, triton.cdiv(reach, 2 * block_n), MAX_SPLITS))
    strides = [stride for x in (q, k_cache, v_cache, out) for stride in x.stride()[:3]]
    seen = UNBOUNDED.value if window is None else window
    scale, softcap = call.scale * LOG2E, 0.0
    if call.softcap is not None:
        scale, softcap = call.scale / call.softcap, call.softcap * LOG2E
    table_stride = 0 if call.block_table is None else call.block_table.stride(0)
    fwd = Launch(
        decode_attention_fwd_kernel,
        (batch * kv_heads, splits, row_tiles),
        (*strides, batch, heads, group, tokens, capacity, seen, pages, page, table_stride, scale, softcap),
        D=head_size,
        D1=d1,
        D2=d2,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=stages,
        CAUSAL=call.causal,
        PAGED=call.block_table is not None,
        HAS_START=call.key_start is not None,
        HAS_SINKS=call.sinks is not None,
        CAPPED=call.softcap is not None,
        num_warps=warps,
    )
    rows = batch * heads * tokens
    combine = Launch(
        decode_attention_combine_kernel,
        (rows,),
        (*out.stride()[:3], rows, heads, tokens, splits),
        D=head_size,
        BLOCK_D=triton.next_power_of_2(head_size),
        BLOCK_SPLITS=MAX_SPLITS,
        HAS_SINKS=call.sinks is not None,
        num_warps=8 if head_size > 128 else 4,
    )
    return fwd, combine, splits
