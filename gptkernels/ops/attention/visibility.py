"""Who sees whom: the one definition of the mask.

Query i of Tq stands at position i + Tk - Tq among the keys: the last query is at the last key. It sees key j when
    causal:                    j <= position
    causal, window w:          position - w < j <= position      (w keys, the query's own included)
    not causal, window w:      |position - j| < w
and j is not left padding (j >= key_start). `window=None`, or one that covers the sequence, is dense.
"""

import torch
from torch import Tensor


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
        window = min(window, 2**62)  # what int64 can be compared with
        seen = seen & (position - key < window)
        if not causal:
            seen = seen & (key - position < window)
    if key_start is not None:
        seen = seen & (key >= key_start.view(-1, 1, 1, 1))
    return seen
