"""Attention, read aloud. Any dtype including float64; what tests and benchmarks compare with."""

import torch
from torch import Tensor

from ..dropout import keep
from .visibility import visible


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    key_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """q: (B, H, Tq, D), k, v: (B, Hkv, Tk, D), key_start: (B,), seed: (1,) int64 -> (B, H, Tq, D);
    with cu_seqlens (N + 1,), q: (T, H, D), k, v: (T, Hkv, D) -> (T, H, D)"""
    if cu_seqlens is not None:
        out = torch.zeros_like(q)
        bounds = cu_seqlens.tolist()
        for start, end in zip(bounds[:-1], bounds[1:], strict=True):
            one, two, three = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            rows = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1) * q.shape[0] + start
            of_document = _attend(one, two, three, None, causal, window, scale, dropout, seed, rows, start)
            out[start:end] = of_document[0].transpose(0, 1)
        return out
    rows = torch.arange(q.shape[0] * q.shape[1], device=q.device).view(*q.shape[:2], 1, 1) * q.shape[2]
    return _attend(q, k, v, key_start, causal, window, scale, dropout, seed, rows, 0)


def _attend(q, k, v, key_start, causal, window, scale, dropout, seed, first_row, first_column):
    """first_row: (B, H, 1, 1), first_column: where dropout counts the queries and keys from"""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = visible(q.shape[2], k.shape[2], causal, window, key_start, q.device)
    # A query that sees no key has all its weights NaN here: they become zeros.
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)
    if dropout:
        row = first_row + torch.arange(q.shape[2], device=q.device).unsqueeze(1)
        column = first_column + torch.arange(k.shape[2], device=q.device)
        weights = weights * keep(seed, row, column, dropout) / (1 - dropout)
    return weights @ v


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """q: (B, H, Tq, D), k_cache, v_cache: (B, Hkv, capacity, D), lengths: (B,) -> (B, H, Tq, D). The newest Tq of each
    row's `lengths` keys belong to the queries; position p of a sequence is in slot p % capacity."""
    out = torch.zeros_like(q)
    tokens, capacity = q.shape[2], k_cache.shape[2]
    for row, length in enumerate(lengths.tolist()):
        # Slots that no query of this call sees may hold anything, so only the others are read.
        reach = length if window is None else min(length, window + tokens - 1)
        slots = torch.arange(length - reach, length, device=q.device) % capacity
        k, v = k_cache[row : row + 1, :, slots], v_cache[row : row + 1, :, slots]
        out[row : row + 1] = attention(q[row : row + 1], k, v, window=window, scale=scale)
    return out
