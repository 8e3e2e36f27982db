"""Who sees whom: the one definition of the mask, and of the elements that dropout keeps.

Query i of Tq stands at position i + Tk - Tq among the keys: the last query is at the last key. It sees key j when
    causal:                    j <= position
    causal, window w:          position - w < j <= position      (w keys, the query's own included)
    not causal, window w:      |position - j| < w
and j is not left padding (j >= key_start). `window=None`, or one that covers the sequence, is dense.
"""

import torch
from torch import Tensor

from ..dropout import MASK, _multiply, threshold


def visible(
    queries: int,
    keys: int,
    causal: bool,
    window: int | None,
    key_start: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """key_start: (B,) or None -> (queries, keys) bool, or (B, 1, queries, keys) with key_start"""
    position = torch.arange(queries, device=device).unsqueeze(1) + keys - queries
    key = torch.arange(keys, device=device)
    return visible_at(position, key, causal, window, key_start)


def visible_at(
    position: Tensor, key: Tensor, causal: bool, window: int | None, key_start: Tensor | None = None
) -> Tensor:
    """position: (M, 1), key: (N,) -> (M, N) bool, or (B, 1, M, N) with key_start: (B,)"""
    seen = key <= position if causal else torch.ones_like(key <= position)
    if window is not None:
        seen = seen & (position - key < window)
        if not causal:
            seen = seen & (key - position < window)
    if key_start is not None:
        seen = seen & (key >= key_start.view(-1, 1, 1, 1))
    return seen


def dropout_keep(seed: Tensor, row: Tensor, column: Tensor, p: float) -> Tensor:
    """The rule of ops/dropout.py for some rows and columns only. row: (..., M, 1), column: (N,) -> (..., M, N) bool

    A row is a query of one head, (b * H + h) * Tq + i, packed documents h * T + i; a column is a key, counted in
    packed documents from the first key of all.
    """
    c0, c1, c2, c3 = column, row & MASK, row >> 32, torch.zeros_like(column)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        high_a, low_a = _multiply(0xD2511F53, c0)
        high_b, low_b = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0 >= threshold(p)
