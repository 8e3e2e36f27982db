"""Attention in CUDA C++ (csrc/attention) for compute capability 9.0, dense and banded, forward and backward."""

import torch
from torch import Tensor

from ... import cuda_library, hardware
from ...torch_library import torch_op
from .outputs import bwd_outputs, fwd_outputs

MAX_TOKENS = 1 << 28
# The kernels' word for a mask that does not end on one side of the diagonal.
UNBOUNDED = 1 << 30


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    dropout: float,
) -> str | None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {q.dtype}"
    if dropout > 0:
        return "has no dropout"
    if q.shape[-1] % 8:
        return f"takes head sizes that are multiples of 8, not {q.shape[-1]}"
    if max(x.shape[-2 if x.ndim == 4 else 0] for x in (q, k)) > MAX_TOKENS:
        return f"takes up to {MAX_TOKENS} tokens"
    for name, x in (("q", q), ("k", k), ("v", v)):
        reason = cuda_library.not_addressable(x)
        if reason:
            return f"{name} {reason}"
    return cuda_library.unsupported(q.device, only_arch=90)


def dq_in_order(window: int | None, deterministic: bool) -> bool:
    """Whether dq is added up in one order: with a window that costs nothing."""
    return window is not None or deterministic


def describe(q, k, v, key_start, cu_seqlens, causal, window, scale, dropout) -> str:
    if dq_in_order(window, torch.are_deterministic_algorithms_enabled()):
        return "the gradients have the same bits on every run"
    return "dq is summed in any order; torch.use_deterministic_algorithms(True) fixes it"


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, head and token in (B, H, T, D) or packed (T, H, D)"""
    if x.ndim == 4:
        return x.stride(0), x.stride(1), x.stride(2)
    return 0, x.stride(1), x.stride(0)


def shape_fields(q, k, key_start, cu_seqlens, causal, window, scale) -> dict:
    """csrc/attention/attention.h's AttentionShape"""
    packed = cu_seqlens is not None
    batch, q_len, k_len = (cu_seqlens.shape[0] - 1, q.shape[0], k.shape[0]) if packed else (*q.shape[::2], k.shape[2])
    left = UNBOUNDED if window is None else min(window - 1, UNBOUNDED)
    return {
        "batch": batch,
        "heads": q.shape[1],
        "kv_heads": k.shape[1],
        "q_len": q_len,
        "k_len": k_len,
        "head_dim": q.shape[-1],
        "left": left,
        "right": 0 if causal else left,
        "scale": scale,
        "key_start": key_start,
        "cu_seqlens": cu_seqlens,
    }


def tensor_fields(**tensors: Tensor) -> dict:
    """csrc/attention/attention.h's AttentionTensor: tensors with head and token dimensions, and their strides"""
    return {name: (x, *strides(x)) for name, x in tensors.items()}


@torch_op(fake=fwd_outputs)
def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """q: (B, H, Tq, D), k, v: (B, Hkv, Tk, D), key_start: (B,) or packed q: (T, H, D), k, v: (T, Hkv, D),
    cu_seqlens: (N + 1,) -> out: as q, lse: (B, H, Tq) or (H, T)"""
    out, lse = fwd_outputs(q, k, v, key_start, cu_seqlens, seed, causal, window, scale, dropout)
    if q.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    q, k, v = cuda_library.addressable(q, k, v)
    fields = shape_fields(q, k, key_start, cu_seqlens, causal, window, scale)
    fields |= tensor_fields(q=q, k=k, v=v, out=out)
    fields["lse"] = lse
    fields["dtype"] = cuda_library.DTYPE[q.dtype]
    fields["sm_count"] = hardware.sm_count(q.device)
    fields["tile_counter"] = cuda_library.zeroed_counters(q.device)
    cuda_library.launch("attention_fwd", q.device, fields)
    return out, lse


@torch_op(fake=bwd_outputs)
def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_start: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    dropout: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dout, q, out: (B, H, Tq, D), k, v: (B, Hkv, Tk, D), lse: (B, H, Tq), or packed as in attention_fwd
    -> dq, dk, dv: as q, k, v. dk and dv have the same bits on every run, dq with a window or `deterministic`."""
    grads = bwd_outputs(
        dout, q, k, v, out, lse, key_start, cu_seqlens, seed, causal, window, scale, dropout, deterministic
    )
    if q.numel() == 0 or k.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    dout, q, k, v = cuda_library.addressable(dout, q, k, v)
    fields = shape_fields(q, k, key_start, cu_seqlens, causal, window, scale)
    workspace_bytes = cuda_library.load().attention_bwd_workspace_bytes(fields, hardware.sm_count(q.device))
    dq, dk, dv = grads
    fields |= tensor_fields(dout=dout, q=q, k=k, v=v, out=out, dq=dq, dk=dk, dv=dv)
    fields["lse"] = lse
    fields["workspace"] = torch.empty((workspace_bytes // 4,), dtype=torch.float32, device=q.device)
    fields["dtype"] = cuda_library.DTYPE[q.dtype]
    fields["sm_count"] = hardware.sm_count(q.device)
    fields["dq_in_order"] = dq_in_order(window, deterministic)
    cuda_library.launch("attention_bwd", q.device, fields)
    return grads
