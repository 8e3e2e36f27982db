"""Who sees whom: the one definition of the mask.

Query i of Tq stands at position i + Tk - Tq among the keys: the last query is at the last key. It sees key j when
    position - left <= j <= position + right
and j is not left padding (j >= key_start). None: all keys on that side. As attention is called, (left, right) is
    causal:                       (None, 0)
    causal, window w:             (w - 1, 0)        (w keys, the query's own included)
    not causal:                   (None, None)
    not causal, window w:         (w - 1, w - 1)
    window (left, right):         itself; with causal, (left, 0)
"""

import torch
from torch import Tensor

Side = int | None
Window = int | tuple[Side, Side] | None


def sides(causal: bool, window: Window) -> tuple[Side, Side]:
    """-> left, right"""
    if isinstance(window, tuple):
        left, right = (None if side == -1 else side for side in window)
    else:
        left = right = None if window is None else window - 1
    return left, 0 if causal else right


def visible(
    queries: int,
    keys: int,
    causal: bool,
    window: Window,
    key_start: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """key_start: (B,) or None -> (queries, keys) bool, or (B, 1, queries, keys) with key_start"""
    position = positions(queries, keys, device)
    key = torch.arange(keys, device=device)
    return visible_at(position, key, causal, window, key_start)


def positions(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """-> (queries, 1)"""
    return torch.arange(queries, device=device).unsqueeze(1) + keys - queries


def visible_at(position: Tensor, key: Tensor, causal: bool, window: Window, key_start: Tensor | None = None) -> Tensor:
    """position: (M, 1), key: (N,) -> (M, N) bool, or (B, 1, M, N) with key_start: (B,)"""
    left, right = sides(causal, window)
    seen = torch.ones_like(key <= position)
    most = 2**62  # what int64 can be compared with
    if left is not None:
        seen = seen & (position - key <= min(left, most))
    if right is not None:
        seen = seen & (key - position <= min(right, most))
    if key_start is not None:
        seen = seen & (key >= key_start.view(-1, 1, 1, 1))
    return seen
