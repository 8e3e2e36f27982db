"""Attention of the newest tokens over a cache of keys and values."""

import torch
from torch import Tensor

from ....dispatch import Call, op
from ... import checks
from ...autocast import autocast
from ..op import check_heads, check_scale, check_window, padded_heads
from ..record import DecodeCall
from . import eager, triton_kernels

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
    backend: str = "auto",
) -> Call[Tensor]:
    """Causal attention of the newest Tq tokens of each row, whose keys and values are in the cache already.

    q: (B, H, Tq, D), Tq up to 16; k_cache, v_cache: (B, Hkv, capacity, D); lengths: (B,) int32, the tokens of each row
    so far, the newest Tq included -> (B, H, Tq, D). Has no gradient.

    The token at position p (from 0) is in slot p % capacity.
    - Without a window, or with one above `capacity`, nothing may have been overwritten: lengths <= capacity.
    - With window <= capacity the cache may be a ring, and lengths may be anything. The oldest of the Tq queries sees
      `window` keys and the newest one Tq - 1 more, so a ring needs window + Tq - 1 slots: `window` for one token at a
      time. Fewer is an error.
    Slots that no query sees may hold anything, NaN included. A row of length 0 gives zeros. Values of lengths are
    checked on CPU tensors only; on a GPU they are clamped to what the cache may hold.
    """
    q, k_cache, v_cache = autocast(q, k_cache, v_cache)

    def check():
        check_heads(q, k_cache, v_cache, packed=False, names=("k_cache", "v_cache"))
        check_window(window)
        check_scale(scale)
        check_cache(q, k_cache, lengths, window)

    def record():
        check_values(lengths, k_cache, window)
        if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad):
            raise ValueError(
                "q, k_cache and v_cache must not require gradients (decode_attention has none): use no_grad()"
            )
        width = None if window is None or window > k_cache.shape[2] else window
        factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
        return DecodeCall(*padded_heads(q, k_cache, v_cache), lengths, width, factor)

    def run(kernels, call):
        out = kernels.decode_attention_fwd(call)
        return out if out.shape == q.shape else out[..., : q.shape[-1]]

    return Call("decode_attention", BACKENDS, backend, check, record, run)


def check_cache(q: Tensor, k_cache: Tensor, lengths: Tensor, window: int | None) -> None:
    tokens, capacity = q.shape[2], k_cache.shape[2]
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"q must have 1 ... {MAX_TOKENS} tokens (dimension 2), not {tokens}; attention takes more")
    if window is not None and window <= capacity < window + tokens - 1:
        raise ValueError(
            f"k_cache must have at least window + Tq - 1 = {window + tokens - 1} slots for {tokens} tokens at a time "
            f"and a window of {window}, not {capacity}"
        )
    checks.check_tensor("lengths", lengths, dtypes=(torch.int32,), ndim=1, device=q.device)
    checks.check_shape("lengths", lengths, q.shape[:1], "q's batch")


def check_values(lengths: Tensor, k_cache: Tensor, window: int | None) -> None:
    """Of lengths that are at hand; the launchers look at others."""
    if not torch.compiler.is_compiling() and lengths.device.type == "cpu" and type(lengths) is Tensor:
        checks.check_cache_lengths(lengths, k_cache.shape[2], window)
