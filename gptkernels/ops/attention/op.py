"""Attention, dense or banded, over whole sequences."""

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

BACKENDS = {"cuda": cuda_kernels, "triton": triton_kernels, "eager": eager, "torch": native}
HEAD_SIZES = range(1, 257)
# What kernels begin at: smaller heads are padded to it with zeros, which change no score.
SMALLEST_HEAD = 16


@op()
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
    backend: str = "auto",
) -> Call[Tensor]:
    """softmax(q k^T * scale) v over the keys that each query sees, the last query being at the last key.

    q: (B, H, Tq, D), k, v: (B, Hkv, Tk, D) -> (B, H, Tq, D) in q's memory order. Hkv divides H, D is 1 ... 256 (copied
    and padded below 16).
    Strides are free as long as the last dimension is contiguous; a tensor where it is not is copied once.

    window: how many keys a query sees, its own included (causal), or keys at a distance below `window`
        (causal=False); None: all. gptkernels.ops.attention says what other libraries call the same.
    scale: positive, 1 / sqrt(D) by default.
    dropout: applied whenever it is > 0: pass 0.0 in evaluation.
    key_start: (B,) int32, the first key of each row that is not left padding; clamped to 0 ... Tk.
    cu_seqlens: (N + 1,) int32 from 0 to T: packed documents, q: (T, H, D), k, v: (T, Hkv, D) -> (T, H, D). Values are
        checked on CPU tensors only, because reading them would stop a GPU: there bounds that do not rise from 0 to T
        give rows of anything, and read and write nothing outside of the tensors.
    A query that sees no key gives zeros, and zero gradients. Under autocast q, k and v are cast to its dtype.
    Gradients have the same bits on every run with the Triton and CUDA backends, but for the CUDA backend's dq without a
    window, for which that takes torch.use_deterministic_algorithms(True).
    """
    q, k, v = autocast(q, k, v)

    def check():
        check_heads(q, k, v, packed=cu_seqlens is not None)
        check_options(q, causal, window, scale, dropout)
        check_lengths(q, k, key_start, cu_seqlens)

    def record():
        check_documents(q, cu_seqlens)
        longest = max(q.shape[-2], k.shape[-2]) if cu_seqlens is None else q.shape[0]
        width = None if window is None or window >= longest else window
        factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
        return AttentionCall(*padded_heads(q, k, v), key_start, cu_seqlens, None, causal, width, factor, float(dropout))

    def run(kernels, call):
        out = native.run(call) if kernels is native else apply(AttentionFunction, kernels, call.key, *call.flat())
        return out if out.shape == q.shape else out[..., : q.shape[-1]]

    return Call("attention", BACKENDS, backend, check, record, run)


class AttentionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, key, *values):
        call = with_key(AttentionCall(*values), key)
        if call.dropout:
            call.seed = draw_seed(call.q.device)
        out, lse = kernels.attention_fwd(call)
        tensors, ctx.options = values[:5], values[6:]
        ctx.save_for_backward(*tensors, call.seed, out, lse)
        ctx.kernels, ctx.key = kernels, key
        return out

    @staticmethod
    def backward(ctx, dout):
        *tensors, out, lse = ctx.saved_tensors
        call = with_key(AttentionCall(*tensors, *ctx.options), ctx.key)
        deterministic = torch.are_deterministic_algorithms_enabled()
        # A gradient expanded from one number has no contiguous dimension.
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        grads = ctx.kernels.attention_bwd(call, dout, out, lse, deterministic)
        grads = first_order_only("attention", grads, (dout, *tensors[:3]))
        return None, None, *grads, None, None, None, None, None, None, None


def padded_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(..., D) -> (..., at least SMALLEST_HEAD), the last dimension contiguous"""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    missing = SMALLEST_HEAD - q.shape[-1]
    if missing > 0:
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    return q, k, v


def check_heads(q: Tensor, k: Tensor, v: Tensor, packed: bool, names: tuple[str, str] = ("k", "v")) -> None:
    """q: (B, H, Tq, D), k, v: (B, Hkv, Tk, D), or packed (T, H, D), (T, Hkv, D)"""
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
    wanted = (q.shape[0], kv_heads, *k.shape[2:-1], q.shape[-1])
    checks.check_shape(names[0], k, wanted, "batch and head size as q" if not packed else "tokens and head size as q")
    checks.check_shape(names[1], v, k.shape, f"{names[0]}'s shape")


def check_options(q: Tensor, causal, window, scale, dropout) -> None:
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, not {causal!r}")
    check_window(window)
    check_scale(scale)
    checks.check_number("dropout", dropout, at_least=0, below=1)


def check_window(window) -> None:
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        raise TypeError(f"window must be None or an int, the number of keys seen, not {window!r}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a query sees itself), not {window}; None sees all keys")


def check_scale(scale) -> None:
    if scale is not None:
        checks.check_number("scale", scale, above=0, below=float("inf"))


def check_lengths(q: Tensor, k: Tensor, key_start, cu_seqlens) -> None:
    if key_start is not None:
        if cu_seqlens is not None:
            raise ValueError("key_start must be None with cu_seqlens: packed documents have no padding")
        checks.check_tensor("key_start", key_start, dtypes=(torch.int32,), ndim=1, device=q.device)
        checks.check_shape("key_start", key_start, q.shape[:1], "q's batch")
    if cu_seqlens is None:
        return
    checks.check_tensor("cu_seqlens", cu_seqlens, dtypes=(torch.int32,), ndim=1, device=q.device)
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens must have at least 1 element (documents + 1), not 0")


def check_documents(q: Tensor, cu_seqlens: Tensor | None) -> None:
    """Of values that are at hand; the launchers look at others."""
    if cu_seqlens is None or torch.compiler.is_compiling():
        return
    if cu_seqlens.device.type == "cpu" and type(cu_seqlens) is Tensor:
        checks.check_bounds(cu_seqlens, q.shape[0])
