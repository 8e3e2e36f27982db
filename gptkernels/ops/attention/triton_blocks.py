"""Pieces that the attention kernels share: where a program works, what it loads, whom its rows see.

A head is kept in one or two parts whose sizes are powers of two (80 = 64 + 16, 96 = 64 + 32), because Triton's tiles
are, and padding 80 to 128 would cost 60% more.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.target_info import cuda_capability_geq

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
# Sizes that change from call to call: no variant of a kernel is worth compiling for one of them being 1 or 16 * n.
UNSPECIALIZED = (
    "tiles",
    "batch_heads",
    "section",
    "heads",
    "group",
    "rows",
    "keys",
    "documents",
    "behind",
    "ahead",
    "slope_stride",
    "drop_below",
)


@triton.jit
def locate(cu_seqlens_ptr, documents, rows, tile, BLOCK: tl.constexpr):
    """Packed documents, tile (of all documents') -> its document, and its place there.

    Document n's tiles count from start // BLOCK + n: nobody has to add up lengths, and at most one tile too many each
    ends up with nothing to do. Bounds that do not rise from 0 to `rows` give wrong tiles, but none outside of the rows.
    """
    low, high = 0, documents - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens_ptr + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle - 1
    start, _ = rows_of(cu_seqlens_ptr, low, rows)
    return low, tl.maximum(tile - (start // BLOCK + low), 0)


@triton.jit
def rows_of(cu_seqlens_ptr, document, rows):
    """-> the document's first row and length"""
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + document), 0), rows)
    return start, tl.minimum(tl.load(cu_seqlens_ptr + document + 1), rows) - start


@triton.jit
def tile_and_head(tiles, heads, section, LAST_FIRST: tl.constexpr):
    """Which tile of which head (of all rows of the batch) a program takes: sections of heads whose keys and values fit
    the L2 cache together, and in a section the tiles with the most work first."""
    program = tl.program_id(0)
    per_section = tiles * section
    first_head = program // per_section * section
    in_section = tl.minimum(section, heads - first_head)
    place = program % per_section
    tile = place // in_section
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tile, first_head + place % in_section


@triton.jit
def load_tile(
    ptr,  # row 0 of (limit, D), rows `stride` apart
    first,
    stride,
    low,
    limit,
    D: tl.constexpr,
    FROM: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """-> (ROWS, COLUMNS) from row `first`, column FROM on; if CHECKED, rows outside of low ... limit - 1 are zeros"""
    row = tl.arange(0, ROWS)[:, None]
    column = FROM + tl.arange(0, COLUMNS)[None, :]
    # What does not depend on `first` is a sum of its own, which leaves the caller's loop.
    pointers = ptr + first.to(tl.int64) * stride + (row.to(tl.int64) * stride + column)
    if CHECKED:
        mask = (first + row >= low) & (first + row < limit) & (column < D)
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif FROM + COLUMNS > D:
        tile = tl.load(pointers, mask=column < D, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_head(
    head,  # (pointer to row 0, stride of rows), (descriptors of both parts of (B, H, T, D)), (b, h, row 0) in there
    first,
    low,
    limit,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    ROWS: tl.constexpr,
    CHECKED: tl.constexpr,
    TMA: tl.constexpr,
):
    """-> (ROWS, D1), (ROWS, D2), of which rows outside of low ... limit - 1 are zeros if CHECKED. With TMA nobody
    looks at low and limit: what the descriptors' shape does not hold is zeros."""
    rows, descriptors, place = head
    if TMA:
        b, h, start = place
        part1 = descriptors[0].load([b.to(tl.int32), h.to(tl.int32), start + first, 0]).reshape(ROWS, D1)
        part2 = part1
        if D2 > 0:
            part2 = descriptors[1].load([b.to(tl.int32), h.to(tl.int32), start + first, D1]).reshape(ROWS, D2)
    else:
        ptr, stride = rows
        part1 = load_tile(ptr, first, stride, low, limit, D, 0, D1, ROWS, CHECKED)
        part2 = part1
        if D2 > 0:
            part2 = load_tile(ptr, first, stride, low, limit, D, D1, D2, ROWS, CHECKED)
    return part1, part2


@triton.jit
def store_head(ptr, first, stride, limit, part1, part2, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """part1: (ROWS, D1), part2: (ROWS, D2)"""
    row = tl.arange(0, part1.shape[0])[:, None]
    pointers = ptr + first.to(tl.int64) * stride + row.to(tl.int64) * stride
    column = tl.arange(0, D1)[None, :]
    in_rows = first + row < limit
    tl.store(pointers + column, part1.to(ptr.dtype.element_ty), mask=in_rows & (column < D))
    if D2 > 0:
        column = D1 + tl.arange(0, D2)[None, :]
        tl.store(pointers + column, part2.to(ptr.dtype.element_ty), mask=in_rows & (column < D))


@triton.jit
def zeros_head(ROWS: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    # Triton has no empty tensors: a missing second part is a constant that the compiler drops.
    return tl.zeros((ROWS, D1), tl.float32), tl.zeros((ROWS, D2 if D2 > 0 else 16), tl.float32)


@triton.jit
def inner_products(a1, a2, b1, b2, D2: tl.constexpr):
    """a: (M, D), b: (N, D) -> (M, N)"""
    # float32 inputs keep float32's precision: three products of tfloat32 parts. Others are not affected.
    products = tl.dot(a1, tl.trans(b1), input_precision="tf32x3")
    if D2 > 0:
        products = tl.dot(a2, tl.trans(b2), products, input_precision="tf32x3")
    return products


@triton.jit
def in_place(weights):
    """16-bit operands of a product that stay in registers -> the same. Triton 3.6 lets LLVM move what makes them past
    the wgmma.fence that has to come after it; it moves nothing past assembly that may have effects."""
    if cuda_capability_geq(9) and not cuda_capability_geq(10) and weights.dtype.primitive_bitwidth == 16:
        weights = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [weights], weights.dtype, is_pure=False, pack=2)
    return weights


@triton.jit
def add_weighted(sum1, sum2, weights, x1, x2, D2: tl.constexpr):
    """sum: (M, D) + weights: (M, N) @ x: (N, D)"""
    weights = in_place(weights.to(x1.dtype))
    sum1 = tl.dot(weights, x1, sum1, input_precision="tf32x3")
    if D2 > 0:
        sum2 = tl.dot(weights, x2, sum2, input_precision="tf32x3")
    return sum1, sum2


@triton.jit
def bent(
    products,
    position,
    key,
    scale,  # as the kernels take it
    softcap,  # times log2(e)
    slope,  # times log2(e)
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    PRECISE: tl.constexpr,  # to float32's last bits
):
    """products of queries and keys; position, key: shapes that broadcast -> scores in base 2, and with a softcap the
    derivative by what it bends"""
    scores = products * scale
    derivative = scores
    if SOFTCAP:
        if PRECISE:
            tanh = libdevice.tanh(scores / softcap)
            derivative = 1.0 - tanh * tanh
        else:
            # (1 - tanh) / 2 is 1 / (1 + exp(2 x)), exact enough where tanh is near 1 and its derivative near 0.
            rest = 1.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2E / softcap)))
            tanh = 1.0 - 2.0 * rest
            derivative = 4.0 * rest * (1.0 - rest)
        scores = softcap * tanh
    if ALIBI:
        scores -= slope * tl.abs(position - key).to(tl.float32)
    return scores, derivative


@triton.jit
def sees(position, key, low, keys, band, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """position, key: shapes that broadcast, band: (behind, ahead), what distances are below -> bool, by the rule in
    visibility.py"""
    behind, ahead = band
    seen = (key >= low) & (key < keys)
    if CAUSAL:
        seen = seen & (key <= position)
    if LEFT:
        seen = seen & (position - key < behind)
    if RIGHT:
        seen = seen & (key - position < ahead)
    return seen


@triton.jit
def key_blocks(
    first, last, low, keys, band, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Queries at positions first ... last -> start, full_start, full_stop, stop, in blocks of keys: the blocks with a
    key that some of them see, and among those the blocks with only keys that all of them see."""
    behind, ahead = band
    start, full_start, full_stop, stop = low, low, keys, keys
    if CAUSAL:
        full_stop, stop = tl.minimum(keys, first + 1), tl.minimum(keys, last + 1)
    if LEFT:
        start, full_start = tl.maximum(low, first - behind + 1), tl.maximum(low, last - behind + 1)
    if RIGHT:
        full_stop, stop = tl.minimum(keys, first + ahead), tl.minimum(keys, last + ahead)
    start = start // BLOCK_N
    stop = tl.maximum(tl.cdiv(tl.maximum(stop, 0), BLOCK_N), start)
    full_start = tl.minimum(tl.cdiv(full_start, BLOCK_N), stop)
    full_stop = tl.maximum(tl.minimum(tl.maximum(full_stop, 0) // BLOCK_N, stop), full_start)
    return start, full_start, full_stop, stop


@triton.jit
def query_blocks(
    first,
    last,
    low,
    offset,
    queries,
    band,
    CAUSAL: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Keys first ... last, of which those below `low` are padding -> the same for the queries that see them; query i
    is at position i + offset."""
    behind, ahead = band
    start, full_start, full_stop, stop = 0, 0, queries, queries
    real = tl.maximum(first, low)
    if CAUSAL:
        start, full_start = real - offset, last - offset
    if LEFT:
        full_stop, stop = real + behind - offset, last + behind - offset
    if RIGHT:
        start, full_start = real - ahead + 1 - offset, last - ahead + 1 - offset
    start = tl.maximum(start, 0) // BLOCK_M
    stop = tl.maximum(tl.cdiv(tl.maximum(tl.minimum(stop, queries), 0), BLOCK_M), start)
    stop = tl.where(real > last, start, stop)
    full_start = tl.minimum(tl.cdiv(tl.maximum(full_start, 0), BLOCK_M), stop)
    full_stop = tl.minimum(tl.maximum(tl.minimum(full_stop, queries), 0) // BLOCK_M, stop)
    full_stop = tl.where(real > first, full_start, tl.maximum(full_stop, full_start))
    return start, full_start, full_stop, stop
