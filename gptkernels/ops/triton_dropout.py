"""The rule of dropout.py inside Triton kernels."""

import triton
import triton.language as tl


@triton.jit
def counted_from(seed_ptr, batch_head, rows, first_row, first_column, PLACED: tl.constexpr):
    """batch_head, first_row: int64 -> the row and column that dropout has for the first query and key: as they come, or
    as the seed places them in a whole that they are a part of (ops/dropout.py)"""
    if PLACED:
        first_row += batch_head * (tl.load(seed_ptr + 1) - rows) + tl.load(seed_ptr + 2)
        first_column += tl.load(seed_ptr + 3).to(tl.int32)
    return first_row, first_column


@triton.jit
def kept(seed_ptr, row, column, drop_below):
    """row: int64, column: int32, shapes that broadcast -> bool, by the rule in ops/dropout.py"""
    c0 = column + tl.zeros_like(row).to(tl.int32)
    c1 = row.to(tl.int32) + tl.zeros_like(column)
    c2 = (row >> 32).to(tl.int32) + tl.zeros_like(column)
    word, _, _, _ = tl.philox(tl.load(seed_ptr), c0, c1, c2, tl.zeros_like(c0))
    return word.to(tl.uint32, bitcast=True).to(tl.int64) >= drop_below
