"""Which elements dropout keeps: one rule for every backend, so that they agree element by element.

Element (row, column) is kept when word 0 of Philox4x32-10, with the seed as key and (column, row mod 2^32, row // 2^32,
0) as counter, is at least p * 2^32. The seed is a tensor of one int64, so that CUDA graphs and checkpointing, which
know how to replay torch's generators, replay dropout too.

A part of a larger call has a seed of four numbers: the seed, the rows of a head in the whole, and of the part's first
query and first key the row in its head and the column. It drops what the whole would.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MASK = 0xFFFFFFFF

# What a drawn seed becomes, where several processes have to agree on it, or must not have the same
_change: Callable[[Tensor], Tensor] | None = None


def draw_seed(device: torch.device) -> Tensor:
    """(1,) int64, from torch's own generator for `device`."""
    seed = torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
    return seed if _change is None else _change(seed)


def apart(seed: Tensor, place: int) -> Tensor:
    """Another seed for each place, of one that all of them have drawn"""
    return (seed + place * 0x9E3779B97F4A7C1) % 2**62


@contextmanager
def changing_seeds(change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside, seeds are what `change` makes of those that are drawn."""
    global _change
    before, _change = _change, change
    try:
        yield
    finally:
        _change = before


def placed(seed: Tensor, rows: int, first_row: int, first_column: int) -> Tensor:
    """seed: (1,) int64 -> (4,), of a part"""
    return torch.cat((seed, torch.tensor((rows, first_row, first_column), dtype=torch.int64, device=seed.device)))


def threshold(p: float) -> int:
    """Words below this are dropped."""
    return min(round(p * 2**32), MASK)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, for 32-bit words kept in int64 (where the product itself would not fit)."""
    high = ((a >> 16) * b + (((a & 0xFFFF) * b) >> 16)) >> 16
    return high, (a * b) & MASK


def keep(seed: Tensor, row: Tensor, column: Tensor, p: float) -> Tensor:
    """seed: (1,) int64, row, column: int64 that broadcast -> bool"""
    c0, c1, c2, c3 = column, row & MASK, row >> 32, torch.zeros_like(column)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        high_a, low_a = _multiply(0xD2511F53, c0)
        high_b, low_b = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0 >= threshold(p)


def dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """x: (..., N), seed: (1,) int64 -> x where it is kept, scaled up for the rest; x itself without a seed"""
    if seed is None:
        return x
    return x * keep_mask(seed, x.numel() // x.shape[-1], x.shape[-1], p).view(x.shape) / (1 - p)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """seed: (1,) int64 -> (rows, columns) bool"""
    row = torch.arange(rows, device=seed.device).unsqueeze(1)
    return keep(seed, row, torch.arange(columns, device=seed.device).unsqueeze(0), p)
