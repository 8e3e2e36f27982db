"""Attention of the newest tokens over a cache of keys and values."""

import torch
from torch import Tensor

from ....dispatch import Call, op
from ... import checks
from ...autocast import autocast
from ..op import check_columns, check_heads, check_window, padded_heads
from ..record import DecodeCall
from . import eager, triton_kernels
from .eager import check_values

BACKENDS = {"triton": triton_kernels, "eager": eager}
MAX_TOKENS = 16


@op()
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
    backend: str = "auto",
) -> Call[Tensor]:
    """Attention of the newest Tq tokens of each row, whose keys and values are in the cache already.

    q: (B, H, Tq, D), Tq up to 16; k_cache, v_cache: (B, Hkv, capacity, D); lengths: (B,) int32, the tokens of each row
    so far, the newest Tq included -> (B, H, Tq, D). Has no gradient.

    The token at position p (from 0) is in slot p % capacity.
    - Without a window, or with one above `capacity`, nothing may have been overwritten: lengths <= capacity.
    - With window <= capacity the cache may be a ring, and lengths may be anything. The oldest of the Tq queries sees
      `window` keys and the newest one Tq - 1 more, so a ring needs window + Tq - 1 slots: `window` for one token at a
      time. Fewer is an error.
    block_table: (B, P) int32. k_cache and v_cache are then pages, (pages, Hkv, page, D), and position p of row b is in
        page block_table[b, p // page]; lengths <= P * page, with a window too.
    sinks, softcap: as attention has them.
    key_start: (B,) int32, the first position of each row that is not left padding.
    causal=False: each of the Tq queries sees the keys after its own too, with a window those closer than that.
    Slots that no query sees may hold anything, NaN included. A row of length 0 gives zeros. Values of lengths and
    block_table are checked on CPU tensors only; on a GPU they are clamped to what there is.
    """
    q, k_cache, v_cache = autocast(q, k_cache, v_cache)

    def check():
        check_heads(q, k_cache, v_cache, packed=False, names=("k_cache", "v_cache"), own_keys=block_table is not None)
        check_window(window)
        checks.check_positive("scale", scale)
        check_cache(q, k_cache, lengths, window, block_table)
        check_columns(q, sinks, None, q.shape[0])
        checks.check_positive("softcap", softcap)
        if key_start is not None:
            check_of_rows("key_start", key_start, q)
        checks.check_flags(causal=causal)

    def record():
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k_cache, v_cache, sinks)):
            raise ValueError(
                "q, k_cache, v_cache and sinks must not require gradients (decode_attention has none): use no_grad()"
            )
        factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
        cap = None if softcap is None else float(softcap)
        columns = (block_table, sinks, key_start)
        table, of_sinks, start = (x if x is None else x.contiguous() for x in columns)
        tensors = *padded_heads(q, k_cache, v_cache), lengths.contiguous()
        call = DecodeCall(*tensors, table, of_sinks, start, window, causal, factor, cap)
        if window is not None and window > call.capacity:
            call.window = None
        # Values that are at hand; the launchers look at others.
        if not torch.compiler.is_compiling() and lengths.device.type == "cpu" and type(lengths) is Tensor:
            check_values(call)
        return call

    def run(kernels, call):
        out = kernels.decode_attention_fwd(call)
        return out if out.shape == q.shape else out[..., : q.shape[-1]]

    return Call("decode_attention", BACKENDS, backend, check, record, run)


def check_cache(q: Tensor, k_cache: Tensor, lengths: Tensor, window: int | None, block_table: Tensor | None) -> None:
    tokens, capacity = q.shape[2], k_cache.shape[2]
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"q must have 1 ... {MAX_TOKENS} tokens (dimension 2), not {tokens}; attention takes more")
    check_of_rows("lengths", lengths, q)
    if block_table is not None:
        checks.check_tensor("block_table", block_table, dtypes=(torch.int32,), ndim=2, device=q.device)
        checks.check_shape("block_table", block_table, (q.shape[0], block_table.shape[1]), "q's batch, pages of a row")
        if 0 in (k_cache.shape[0], k_cache.shape[2]):
            raise ValueError(f"k_cache must have pages of at least one token, not shape {tuple(k_cache.shape)}")
    elif window is not None and window <= capacity < window + tokens - 1:
        raise ValueError(
            f"k_cache must have at least window + Tq - 1 = {window + tokens - 1} slots for {tokens} tokens at a time "
            f"and a window of {window}, not {capacity}"
        )


def check_of_rows(name: str, value, q: Tensor) -> None:
    """value: (B,) int32"""
    checks.check_tensor(name, value, dtypes=(torch.int32,), ndim=1, device=q.device)
    checks.check_shape(name, value, q.shape[:1], "q's batch")
