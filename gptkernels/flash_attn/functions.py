"""Attention over whole sequences and packed documents."""

from typing import Any

import torch
from torch import Tensor

from ..ops import checks
from ..ops.attention import attention
from .arguments import ALL, Window, heads_first, options_of, unpacked
from .probabilities import over_later_blocks, random_state, seed_after, signed_weights


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = ALL,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """q: (B, Tq, H, D), k, v: (B, Tk, Hkv, D) -> as q; with return_attn_probs out, lse: (B, H, Tq) and, with dropout,
    the weights as flash-attn's tests want them: (B, H, Tq, Tk), negative where dropped, each block of keys over the
    largest of it and those after it. They take a second, slow computation."""
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    heads = [heads_first(name, x, 4) for name, x in (("q", q), ("k", k), ("v", v))]
    if not return_attn_probs:
        return attention(*heads, **options).transpose(1, 2)
    before = random_state(q.device) if dropout_p else None
    out, lse = attention(*heads, **options, return_lse=True)
    weights = None
    if before is not None:
        eye = torch.eye(k.shape[1], device=k.device).expand(*heads[1].shape[:2], -1, -1)
        weights = signed_weights(heads[0], heads[1], eye, options, seed_after(before, q.device))
        weights = over_later_blocks(weights, lse, q.shape[-1])
    return out.transpose(1, 2), lse, weights


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = ALL,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """qkv: (B, T, 3, H, D) -> (B, T, H, D); see flash_attn_func"""
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    q, k, v = unpacked("qkv", qkv, 5, 3)
    return flash_attn_func(q, k, v, *options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = ALL,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """q: (B, Tq, H, D), kv: (B, Tk, 2, Hkv, D) -> as q; see flash_attn_func"""
    options = dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    k, v = unpacked("kv", kv, 5, 2)
    return flash_attn_func(q, k, v, *options)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = ALL,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """q: (Tq, H, D), k, v: (Tk, Hkv, D), cu_seqlens_q, cu_seqlens_k: (N + 1,) int32 -> as q; with return_attn_probs
    lse: (H, Tq) and, with dropout, the weights: (N, H, max_seqlen_q, max_seqlen_k), see flash_attn_func.

    block_table: (N, P) int32, k and v being pages (pages, page, Hkv, D): they are gathered first, which waits for a
    GPU. The longest lengths are what they are whatever max_seqlen_q and max_seqlen_k say."""
    options = options_of(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic)
    if block_table is not None:
        k, v = (documents_of_pages(name, x, cu_seqlens_k, block_table) for name, x in (("k", k), ("v", v)))
    options |= {"cu_seqlens": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    before = random_state(q.device) if return_attn_probs and dropout_p else None
    found = attention(q, k, v, **options, return_lse=return_attn_probs)
    if not return_attn_probs:
        return found
    weights = None
    if before is not None:
        lengths = cu_seqlens_k.diff()
        place = torch.arange(k.shape[0], device=k.device) - cu_seqlens_k[:-1].repeat_interleave(lengths)
        eye = torch.nn.functional.one_hot(place, max_seqlen_k).float().unsqueeze(1).expand(-1, k.shape[1], -1)
        packed = signed_weights(q, k, eye, options, seed_after(before, q.device))
        packed = over_later_blocks(packed.transpose(0, 1), found[1], q.shape[-1])
        weights = packed.new_zeros(len(cu_seqlens_q) - 1, q.shape[1], max_seqlen_q, max_seqlen_k)
        for n, (start, end) in enumerate(zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True)):
            weights[n, :, : end - start] = packed[:, start:end]
    return *found, weights


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = ALL,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """qkv: (T, 3, H, D), cu_seqlens: (N + 1,) int32 -> (T, H, D); see flash_attn_varlen_func"""
    bounds = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, dropout_p, softmax_scale
    options = causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    q, k, v = unpacked("qkv", qkv, 4, 3)
    return flash_attn_varlen_func(q, k, v, *(*bounds, *options))


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = ALL,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """q: (Tq, H, D), kv: (Tk, 2, Hkv, D) -> as q; see flash_attn_varlen_func"""
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale
    options = causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    k, v = unpacked("kv", kv, 4, 2)
    return flash_attn_varlen_func(q, k, v, *(*bounds, *options))


def documents_of_pages(name: str, x: Tensor, cu_seqlens: Tensor, block_table: Tensor) -> Tensor:
    """x: (pages, page, Hkv, D), cu_seqlens: (N + 1,), block_table: (N, P) -> (total, Hkv, D)"""
    checks.check_tensor(name, x, ndim=4)
    lengths = cu_seqlens.diff()
    document = torch.arange(len(lengths), device=x.device).repeat_interleave(lengths)
    place = torch.arange(len(document), device=x.device) - cu_seqlens[document]
    return x[block_table[document, place // x.shape[1]].long(), place % x.shape[1]]
