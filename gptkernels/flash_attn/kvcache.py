"""Attention over a cache, which takes new keys in the same call."""

from typing import Any

import torch
from torch import Tensor

from ..failures import UnsupportedError
from ..ops import checks
from ..ops.attention import attention, decode_attention
from ..ops.attention.decode.op import MAX_TOKENS
from ..ops.rope import rope
from .arguments import ALL, Window, heads_first, options_of


class CacheFullError(ValueError, RuntimeError):
    """What bad values are here and what they are to flash-attn"""


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = ALL,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """q: (B, Tq, H, D), k_cache, v_cache: (Bc, S, Hkv, D), or pages (pages, page, Hkv, D) of block_table: (B, P) int32
    -> as q, with return_softmax_lse also lse: (B, H, Tq). Has no gradient.

    k, v: (B, T, Hkv, D), written to the caches in place at positions cache_seqlens, cache_seqlens + 1, ... first, and
    rotated by rotary_cos and rotary_sin, (positions, R / 2), as q is: at the same positions with causal or a window,
    else all of it at cache_seqlens. cache_seqlens: (B,) int32 or one int. cache_batch_idx: (B,) int32, the rows of the
    caches. cache_leftpad: (B,) int32, where the keys of a row begin. num_splits: chosen here, whatever it says.

    Up to 16 queries of a row are decoded from the cache where it lies; more, ALiBi, the log-sum-exp and two-sided
    windows of several queries gather the keys first.
    """
    options = options_of(0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, False)
    q_heads, k_heads, v_heads = (
        heads_first(n, x, 4) for n, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache))
    )
    tokens = q.shape[1]
    pages = pages_of(q, k_cache, cache_batch_idx, block_table)
    lengths = lengths_of(cache_seqlens, q, pages.shape[1] * k_cache.shape[1])
    if (k is None) != (v is None):
        raise ValueError("k and v must be given both, or neither")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given both, or neither")
    if rotary_cos is not None and k is None:
        raise ValueError("k must be given with rotary_cos: what is in the cache is rotated already")
    check_room(lengths, 0 if k is None else k.shape[1], pages, k_cache)
    with torch.no_grad():
        if k is not None and v is not None:
            if cache_seqlens is None:
                raise ValueError("cache_seqlens must be given with k, which goes behind what is there")
            k_new = heads_first("k", k, 4)
            if rotary_cos is not None and rotary_sin is not None:
                follow = causal or options["window"] is not None
                tables = rotary_cos, rotary_sin, lengths, rotary_interleaved
                q_heads, k_new = rotated(q_heads, *tables, follow), rotated(k_new, *tables, True)
            places = places_of_new(k.shape[1], pages, lengths, k_cache.shape[1])
            k_cache[places], v_cache[places] = k_new.transpose(1, 2).to(k_cache.dtype), v.to(v_cache.dtype)
            lengths = lengths + k.shape[1]
        window = options["window"]
        one_sided = window is None or tokens == 1 or causal
        if tokens <= MAX_TOKENS and alibi_slopes is None and not return_softmax_lse and one_sided:
            left = None if window is None or window[0] is None else window[0] + 1
            out = decode_attention(
                q_heads,
                k_heads,
                v_heads,
                lengths,
                window=left,
                scale=softmax_scale,
                softcap=options["softcap"],
                block_table=pages,
                key_start=cache_leftpad,
                causal=causal or (tokens == 1 and left is not None),
            )
            return out.transpose(1, 2)
        gathered, start = ends_of_rows(k_heads, v_heads, pages, lengths)
        start = start if cache_leftpad is None else start + cache_leftpad
        out, lse = attention(q_heads, *gathered, **options, key_start=start, return_lse=True)
    return (out.transpose(1, 2), lse) if return_softmax_lse else out.transpose(1, 2)


def pages_of(q: Tensor, k_cache: Tensor, cache_batch_idx: Tensor | None, block_table: Tensor | None) -> Tensor:
    """-> (B, P) int32: the cache as pages, which its rows are where it has none"""
    if block_table is not None and cache_batch_idx is not None:
        raise UnsupportedError("flash_attn_with_kvcache: cache_batch_idx and block_table do not go together")
    if block_table is not None:
        return block_table
    rows = cache_batch_idx
    if rows is None:
        checks.check_shape("k_cache", k_cache, (q.shape[0], *k_cache.shape[1:]), "q's batch without cache_batch_idx")
        rows = torch.arange(q.shape[0], dtype=torch.int32, device=q.device)
    return rows.unsqueeze(1)


def lengths_of(cache_seqlens: int | Tensor | None, q: Tensor, capacity: int) -> Tensor:
    """-> (B,) int32"""
    if isinstance(cache_seqlens, Tensor):
        return cache_seqlens
    length = capacity if cache_seqlens is None else cache_seqlens
    return torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor, interleaved: bool, follow: bool) -> Tensor:
    """x: (B, H, T, D), cos, sin: (positions, R / 2), lengths: (B,) -> x at positions lengths, and with `follow` those
    after it"""
    position = lengths.long().unsqueeze(1) + torch.arange(x.shape[2], device=x.device) * follow
    tables = cos[position], sin[position]
    return rope(x, x[:, :0], *tables, rotary_dim=2 * cos.shape[-1], interleaved=interleaved)[0]


def check_room(lengths: Tensor, new: int, pages: Tensor, cache: Tensor) -> None:
    """On a CPU, as everywhere values of tensors are checked"""
    capacity = pages.shape[1] * cache.shape[1]
    if lengths.is_cpu and lengths.numel() and int(lengths.max()) + new > capacity:
        raise CacheFullError(
            f"cache_seqlens must leave room for k's {new} tokens in the {capacity} of the cache (block_table's pages), "
            f"but is {lengths.tolist()}"
        )


def places_of_new(count: int, pages: Tensor, lengths: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """pages: (B, P) of `size` tokens, lengths: (B,) -> the page and the slot in it of the next tokens: (B, count)"""
    position = lengths.long().unsqueeze(1) + torch.arange(count, device=lengths.device)
    return pages.long().gather(1, position // size), position % size


def ends_of_rows(k: Tensor, v: Tensor, pages: Tensor, lengths: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """k, v: (pages, Hkv, page, D), pages: (B, P), lengths: (B,) -> k, v: (B, Hkv, P * page, D) with each row's newest
    key last, and where its first one is: (B,) int32"""
    size, capacity = k.shape[2], pages.shape[1] * k.shape[2]
    start = (capacity - lengths).int()
    place = (torch.arange(capacity, device=k.device) - start.unsqueeze(1)).clamp(min=0)
    page, slot = pages.long().gather(1, place // size).clamp(0, k.shape[0] - 1), place % size
    gathered = [x.transpose(1, 2)[page, slot].transpose(1, 2) for x in (k, v)]
    return (gathered[0], gathered[1]), start
