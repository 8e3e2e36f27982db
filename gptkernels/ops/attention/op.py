"""Attention, dense or banded, over whole sequences."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...dispatch import Call, op
from ...records import with_key
from ...torch_library import apply, first_order_only
from .. import checks
from ..autocast import autocast
from ..dropout import draw_seed
from . import cuda_kernels, eager, native, triton_kernels
from .record import AttentionCall
from .visibility import Window, sides

BACKENDS = {"cuda": cuda_kernels, "triton": triton_kernels, "eager": eager, "torch": native}
HEAD_SIZES = range(1, 257)
# What kernels begin at: smaller heads are padded to it with zeros, which change no score.
SMALLEST_HEAD = 16
# Of a record's fields, all but q, k, v and sinks
WITHOUT_GRADIENT = (None,) * (len(AttentionCall.__slots__) - 4)


@op()
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
    deterministic: bool = False,
    backend: str = "auto",
) -> Call[Any]:
    """softmax(q k^T * scale) v over the keys that each query sees, the last query being at the last key.

    q: (B, H, Tq, D), k, v: (B, Hkv, Tk, D) -> (B, H, Tq, D) in q's memory order. Hkv divides H, D is 1 ... 256 (copied
    and padded below 16).
    Strides are free as long as the last dimension is contiguous; a tensor where it is not is copied once.

    window: how many keys a query sees, its own included (causal), or keys at a distance below `window`
        (causal=False); None: all. Or a pair (left, right): how many keys before and after its own position it sees,
        None or -1: all of them. gptkernels.ops.attention says what other libraries call the same.
    scale: positive, 1 / sqrt(D) by default.
    dropout: applied whenever it is > 0: pass 0.0 in evaluation.
    key_start: (B,) int32, the first key of each row that is not left padding; clamped to 0 ... Tk.
    cu_seqlens: (N + 1,) int32 from 0 to T: packed documents, q: (T, H, D), k, v: (T, Hkv, D) -> (T, H, D). Values are
        checked on CPU tensors only, because reading them would stop a GPU: there bounds that do not rise from 0 to T
        give rows of anything, and read and write nothing outside of the tensors.
    cu_seqlens_k: (N + 1,) int32 from 0 to Tk, with cu_seqlens: k, v are (Tk, Hkv, D), each document with as many keys.
    softcap: positive; scores become softcap * tanh(score / softcap) before all that follows.
    alibi_slopes: (H,) or (B, H) float32, or (N, H) of documents: slope * |position - key| is taken off the scores. They
        get no gradient.
    sinks: (H,) in q's dtype or float32: one more score for each query, that of no key.
    return_lse: -> also the logarithm of each query's sum of exponentials, (B, H, Tq) or (H, T) float32, with gradients.
    A query that sees no key gives zeros, and zero gradients; its lse is -inf, or its sink. Under autocast q, k and v
    are cast to its dtype.
    Gradients have the same bits on every run with the Triton and CUDA backends, but for the CUDA backend's dq without a
    window, for which that takes deterministic=True, or torch.use_deterministic_algorithms(True).
    """
    q, k, v = autocast(q, k, v)

    def check():
        check_heads(q, k, v, packed=cu_seqlens is not None, own_keys=cu_seqlens_k is not None)
        checks.check_flags(causal=causal, return_lse=return_lse, deterministic=deterministic)
        check_options(causal, window, scale, dropout, softcap)
        check_lengths(q, key_start, cu_seqlens, cu_seqlens_k)
        check_columns(q, sinks, alibi_slopes, q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1)

    def record():
        check_values(q, k, cu_seqlens, cu_seqlens_k, alibi_slopes)
        tokens = -2 if cu_seqlens is None else 0
        left, right = sides(causal, window)
        if left is not None and left >= k.shape[tokens] - 1:
            left = None
        if right and right >= q.shape[tokens] - 1:
            right = None
        factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
        cap = None if softcap is None else float(softcap)
        # As kernels read them, one after the other
        columns = (sinks, key_start, cu_seqlens, cu_seqlens_k, alibi_slopes)
        of_sinks, start, bounds, bounds_k, slopes = (x if x is None else x.contiguous() for x in columns)
        return AttentionCall(
            *padded_heads(q, k, v), of_sinks, start, bounds, bounds_k, slopes, None,
            left, right, factor, float(dropout), cap, return_lse, deterministic,
        )  # fmt: skip

    def run(kernels, call):
        found = native.run(call) if kernels is native else apply(AttentionFunction, kernels, call.key, *call.flat())
        out = found[0] if return_lse else found
        out = out if out.shape == q.shape else out[..., : q.shape[-1]]
        return (out, found[1]) if return_lse else out

    return Call("attention", BACKENDS, backend, check, record, run)


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, key, *values):
        call = with_key(AttentionCall(*values), key)
        if call.dropout:
            call.seed = draw_seed(call.q.device)
        out, lse = kernels.attention_fwd(call)
        tensors, ctx.options = values[:8], values[9:]
        ctx.save_for_backward(*tensors, call.seed, out, lse)
        ctx.kernels, ctx.key = kernels, key
        return (out, lse) if call.return_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):
        *tensors, out, lse = ctx.saved_tensors
        call = with_key(AttentionCall(*tensors, *ctx.options), ctx.key)
        call.deterministic = call.deterministic or torch.are_deterministic_algorithms_enabled()
        # A gradient expanded from one number has no contiguous dimension.
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        *grads, dsinks = ctx.kernels.attention_bwd(call, dout, out, lse, dlse)
        grads = (*grads, None if call.sinks is None else dsinks)
        grads = first_order_only("attention", grads, (dout, dlse, *tensors[:4]))
        return None, None, *grads, *WITHOUT_GRADIENT


def padded_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., D) -> (..., at least SMALLEST_HEAD), the last dimension contiguous"""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    missing = SMALLEST_HEAD - q.shape[-1]
    if missing > 0:
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    return q, k, v


def check_heads(
    q: Tensor, k: Tensor, v: Tensor, packed: bool, names: tuple[str, str] = ("k", "v"), own_keys: bool = False
) -> None:
    """q: (B, H, Tq, D), k, v: (B, Hkv, Tk, D), or packed (T, H, D), (T, Hkv, D). own_keys: the first dimension of k
    and v is their own"""
    ndim = 3 if packed else 4
    layout = "(T, heads, D), as packed documents are" if packed else "(B, heads, T, D)"
    for name, x in zip(("q", *names), (q, k, v), strict=True):
        checks.check_tensor(
            name, x, dtypes=checks.DTYPES if x is q else (q.dtype,), device=q.device if x is not q else None
        )
        if x.ndim != ndim:
            raise ValueError(f"{name} must have shape {layout}, not {tuple(x.shape)}")
    if q.shape[-1] not in HEAD_SIZES:
        raise ValueError(f"q must have a head size (last dimension) of 1 ... 256, not {q.shape[-1]}")
    heads, kv_heads = q.shape[1], k.shape[1]
    if not kv_heads or heads % kv_heads or not heads:
        raise ValueError(f"{names[0]} must have a number of heads that divides q's {heads}, not {kv_heads}")
    wanted = (k.shape[0] if own_keys else q.shape[0], kv_heads, *k.shape[2:-1], q.shape[-1])
    checks.check_shape(names[0], k, wanted, "batch and head size as q" if not packed else "tokens and head size as q")
    checks.check_shape(names[1], v, k.shape, f"{names[0]}'s shape")


def check_options(causal, window, scale, dropout, softcap) -> None:
    check_sides(causal, window)
    checks.check_positive("scale", scale)
    checks.check_number("dropout", dropout, at_least=0, below=1)
    checks.check_positive("softcap", softcap)


def check_sides(causal: bool, window) -> None:
    if not isinstance(window, tuple):
        check_window(window, ", or a pair (left, right)")
        return
    integers = all(side is None or (isinstance(side, int) and not isinstance(side, bool)) for side in window)
    if len(window) != 2 or not integers:
        raise TypeError(f"window must be a pair (left, right) of ints or None, keys before and after, not {window!r}")
    if any(side is not None and side < -1 for side in window):
        raise ValueError(f"window must be a pair of at least 0, or -1 or None for all keys, not {window}")
    if causal and window[1] not in (0, -1, None):
        raise ValueError(f"window must have 0, -1 or None on the right with causal=True, not {window}")


def check_window(window, other: str = "") -> None:
    """other: what else is accepted"""
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        raise TypeError(f"window must be None or an int, the number of keys seen{other}, not {window!r}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a query sees itself), not {window}; None sees all keys")


def check_lengths(q: Tensor, key_start, cu_seqlens, cu_seqlens_k) -> None:
    if key_start is not None:
        if cu_seqlens is not None:
            raise ValueError("key_start must be None with cu_seqlens: packed documents have no padding")
        checks.check_tensor("key_start", key_start, dtypes=(torch.int32,), ndim=1, device=q.device)
        checks.check_shape("key_start", key_start, q.shape[:1], "q's batch")
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k must be None without cu_seqlens, the documents' bounds in q")
        return
    checks.check_tensor("cu_seqlens", cu_seqlens, dtypes=(torch.int32,), ndim=1, device=q.device)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens must have at least 1 element (documents + 1), not 0")
    if cu_seqlens_k is not None:
        checks.check_tensor("cu_seqlens_k", cu_seqlens_k, dtypes=(torch.int32,), ndim=1, device=q.device)
        checks.check_shape("cu_seqlens_k", cu_seqlens_k, cu_seqlens.shape, "cu_seqlens's shape")


def check_columns(q: Tensor, sinks, alibi_slopes, sequences: int) -> None:
    """What there is one of for each head. sequences: rows of the batch, or documents"""
    heads = q.shape[1]
    if sinks is not None:
        dtypes = tuple(dict.fromkeys((q.dtype, torch.float32)))
        checks.check_tensor("sinks", sinks, dtypes=dtypes, ndim=1, device=q.device)
        checks.check_shape("sinks", sinks, (heads,), "q's heads")
    if alibi_slopes is not None:
        checks.check_tensor("alibi_slopes", alibi_slopes, dtypes=(torch.float32,), device=q.device)
        if alibi_slopes.shape not in ((heads,), (sequences, heads)):
            raise ValueError(
                f"alibi_slopes must have shape ({heads},) or ({sequences}, {heads}) (heads, or sequences and heads), "
                f"not {tuple(alibi_slopes.shape)}"
            )


def check_values(q: Tensor, k: Tensor, cu_seqlens, cu_seqlens_k, alibi_slopes) -> None:
    """Of what is not the same for all calls alike; the launchers look at bounds that are not at hand."""
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes must not require gradients: attention has none for them")
    if cu_seqlens is None or torch.compiler.is_compiling():
        return
    for name, bounds, of, tokens in (
        ("cu_seqlens", cu_seqlens, "q", q.shape[0]),
        ("cu_seqlens_k", cu_seqlens_k, "k", k.shape[0]),
    ):
        if bounds is not None and bounds.device.type == "cpu" and type(bounds) is Tensor:
            checks.check_bounds(bounds, tokens, name, of)
