"""Attention, read aloud. Any dtype including float64; what tests and benchmarks compare with."""

from typing import Any

import torch
from torch import Tensor

from ..dropout import keep
from .visibility import Window, positions, visible


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: Window = None,
    scale: float | None = None,
    dropout: float = 0.0,
    key_start: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    seed: Tensor | None = None,
) -> Any:
    """q: (B, H, Tq, D), k, v: (B, Hkv, Tk, D), key_start: (B,), sinks: (H,), alibi_slopes: (H,) or (B, H),
    seed: (1,) int64 -> (B, H, Tq, D); with cu_seqlens (N + 1,), q: (T, H, D), k, v: (T, Hkv, D) -> (T, H, D), and
    with cu_seqlens_k k, v: (Tk, Hkv, D). With return_lse also lse: (B, H, Tq) or (H, T)"""
    options = causal, window, scale, dropout, softcap
    if cu_seqlens is None:
        rows = torch.arange(q.shape[0] * q.shape[1], device=q.device).view(*q.shape[:2], 1, 1) * q.shape[2]
        out, lse = _attend(q, k, v, key_start, sinks, alibi_slopes, *options, seed, rows, 0)
        return (out, lse) if return_lse else out
    documents, lses = (
        [q[:0, :, :1].expand(-1, -1, v.shape[-1])],
        [q.new_zeros((q.shape[1], 0), dtype=torch.promote_types(q.dtype, torch.float32))],
    )
    heads = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)
    bounds = cu_seqlens.tolist()
    key_bounds = bounds if cu_seqlens_k is None else cu_seqlens_k.tolist()
    for n in range(len(bounds) - 1):
        start, end, first_key, end_key = *bounds[n : n + 2], *key_bounds[n : n + 2]
        one = q[start:end].transpose(0, 1).unsqueeze(0)
        two, three = (x[first_key:end_key].transpose(0, 1).unsqueeze(0) for x in (k, v))
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[n : n + 1]
        rows = heads * q.shape[0] + start
        out, lse = _attend(one, two, three, None, sinks, slopes, *options, seed, rows, first_key)
        documents.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    out = torch.cat(documents)
    return (out, torch.cat(lses, 1)) if return_lse else out


def _attend(
    q, k, v, key_start, sinks, slopes, causal, window, scale, dropout, softcap, seed, first_row, first_column
):  # fmt: skip
    """first_row: (B, H, 1, 1), first_column: where dropout counts the queries and keys from -> out, lse"""
    group, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if slopes is not None:
        distance = (positions(queries, keys, q.device) - torch.arange(keys, device=q.device)).abs()
        scores = (scores - slopes.view(-1, q.shape[1], 1, 1) * distance).to(q.dtype)
    seen = visible(queries, keys, causal, window, key_start, q.device)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:  # a column of its own, of no value
        column = sinks.to(q.dtype).view(1, -1, 1, 1).expand(*q.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    lse = scores.to(torch.promote_types(q.dtype, torch.float32)).logsumexp(-1)
    # A query that sees no key has all its weights NaN here: they become zeros.
    weights = scores.softmax(-1)[..., :keys].masked_fill(~seen, 0)
    if dropout:
        row = first_row + torch.arange(queries, device=q.device).unsqueeze(1)
        column = first_column + torch.arange(keys, device=q.device)
        weights = weights * keep(seed, row, column, dropout) / (1 - dropout)
    return weights @ v, lse


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    block_table: Tensor | None = None,
    key_start: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """q: (B, H, Tq, D), k_cache, v_cache: (B, Hkv, capacity, D), lengths, key_start: (B,), sinks: (H,)
    -> (B, H, Tq, D). The newest Tq of each row's `lengths` keys belong to the queries; position p of a sequence is in
    slot p % capacity. With block_table (B, P), k_cache and v_cache are pages (pages, Hkv, page, D), and p is in page
    block_table[row, p // page]."""
    if block_table is not None:
        # Pages that are not used may have any number.
        pages = block_table.long().clamp(0, k_cache.shape[0] - 1)
        k_cache, v_cache = (x[pages].transpose(1, 2).flatten(2, 3) for x in (k_cache, v_cache))
    out = torch.zeros_like(q)
    tokens, capacity = q.shape[2], k_cache.shape[2]
    options: dict[str, Any] = {"window": window, "scale": scale, "sinks": sinks, "softcap": softcap, "causal": causal}
    for row, length in enumerate(lengths.tolist()):
        # Slots that no query of this call sees may hold anything, so only the others are read.
        reach = length if window is None else min(length, window + tokens - 1)
        slots = torch.arange(length - reach, length, device=q.device) % capacity
        k, v = k_cache[row : row + 1, :, slots], v_cache[row : row + 1, :, slots]
        start = None if key_start is None else key_start[row : row + 1] - (length - reach)
        out[row : row + 1] = attention(q[row : row + 1], k, v, key_start=start, **options)
    return out
