"""Attention in CUDA C++ (csrc/attention) for compute capability 9.0, dense and banded, forward and backward."""

import torch
from torch import Tensor

from ... import cuda_library, hardware
from ...cuda_library import Copies, Launch
from ...remembered import remembered
from ...torch_library import torch_op
from .outputs import bwd_outputs, fwd_outputs
from .record import AttentionCall, strides
from .sinks import add_sinks, sinks_grad, without_pairs

MAX_TOKENS = 1 << 28
# The kernels' word for a mask that does not end on one side of the diagonal.
UNBOUNDED = 1 << 30


def unsupported(call: AttentionCall) -> str | None:
    q, k, v = call.q, call.k, call.v
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {q.dtype}"
    if call.dropout > 0:
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


def describe(call: AttentionCall) -> str:
    if dq_in_order(call.window, call.deterministic or torch.are_deterministic_algorithms_enabled()):
        return "the gradients have the same bits on every run"
    return "dq is summed in any order; deterministic=True fixes it"


# What only some calls have
VARIABLES = ("key_start", "cu_seqlens", "cu_seqlens_k", "alibi_slopes")


def variables(call: AttentionCall) -> tuple[Tensor | None, ...]:
    return call.key_start, call.cu_seqlens, call.cu_seqlens_k, call.alibi_slopes


def shape_numbers(call: AttentionCall) -> dict:
    """csrc/attention/attention.h's AttentionShape"""
    q, k, slopes = call.q, call.k, call.alibi_slopes
    batch, q_len, k_len = q.shape[0], q.shape[-2], k.shape[-2]
    if call.cu_seqlens is not None:
        batch, q_len, k_len = call.cu_seqlens.shape[0] - 1, q.shape[0], k.shape[0]
    left, right = (UNBOUNDED if side is None else min(side, UNBOUNDED) for side in (call.left, call.right))
    return {
        "batch": batch,
        "heads": q.shape[1],
        "kv_heads": k.shape[1],
        "q_len": q_len,
        "k_len": k_len,
        "head_dim": q.shape[-1],
        "left": left,
        "right": right,
        "scale": call.scale,
        "softcap": call.softcap or 0.0,
        "slope_stride": 0 if slopes is None or slopes.ndim == 1 else slopes.stride(0),
    }


def prepared(name: str, call: AttentionCall, others: tuple[str, ...], numbers: dict, **tensors: Tensor) -> Launch:
    """tensors: csrc/attention/attention.h's AttentionTensor, which the launch takes first, then `others`, VARIABLES"""
    numbers = {
        **shape_numbers(call),
        **numbers,
        **{tensor: strides(x) for tensor, x in tensors.items()},
        "dtype": cuda_library.DTYPE[call.q.dtype],
        "sm_count": hardware.sm_count(call.q.device),
    }
    return Launch(name, call.q.device, (*tensors, *others, *VARIABLES), numbers)


@torch_op(fake=fwd_outputs)
def attention_fwd(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """-> out: as q, lse: (B, H, Tq) or (H, T)"""
    out, lse = fwd_outputs(call)
    if call.q.numel() == 0 or call.k.numel() == 0:
        out.zero_(), lse.fill_(-torch.inf)
        if call.sinks is not None:
            add_sinks(out, lse, call.sinks)
        return out, lse
    copies, launch = fwd_launch(call, out=out)
    counter = cuda_library.zeroed_counters(call.q.device)
    launch(*copies(call.q, call.k, call.v), out, lse, call.sinks, counter, *variables(call))
    return out, lse


@remembered
def fwd_launch(call: AttentionCall, out: Tensor) -> tuple[Copies, Launch]:
    copies = Copies(call.q, call.k, call.v)
    q, k, v = copies(call.q, call.k, call.v)
    numbers = {"sinks_are_float": call.sinks is not None and call.sinks.dtype == torch.float32}
    others = ("lse", "sinks", "tile_counter")
    return copies, prepared("attention_fwd", call, others, numbers, q=q, k=k, v=v, out=out)


@torch_op(fake=bwd_outputs)
def attention_bwd(
    call: AttentionCall, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dout, out: as q, lse, dlse: (B, H, Tq) or (H, T) -> gradients of q, k, v, sinks. All but that of q have the same
    bits on every run, that of q with a window or `deterministic`."""
    if call.q.numel() == 0 or call.k.numel() == 0:
        return without_pairs(call, dout, out, lse, dlse)
    dq, dk, dv, dsinks = bwd_outputs(call, dout, out, lse, dlse)
    copies, workspace_bytes, launch = bwd_launch(call, dout, out, call.deterministic, grads=(dq, dk, dv))
    workspace = torch.empty((workspace_bytes // 4,), dtype=torch.float32, device=call.q.device)
    dout, q, k, v = copies(dout, call.q, call.k, call.v)
    delta = None if call.sinks is None else torch.empty_like(lse)
    launch(dout, q, k, v, out, dq, dk, dv, lse, dlse, delta, workspace, *variables(call))
    if call.sinks is not None and dsinks is not None and delta is not None:
        dsinks.copy_(sinks_grad(call.sinks, lse, delta))
    return dq, dk, dv, dsinks


@remembered
def bwd_launch(
    call: AttentionCall, dout: Tensor, out: Tensor, deterministic: bool, grads: tuple[Tensor, ...]
) -> tuple[Copies, int, Launch]:
    """-> with the bytes of its workspace"""
    copies = Copies(dout, call.q, call.k, call.v)
    dout, q, k, v = copies(dout, call.q, call.k, call.v)
    dq, dk, dv = grads
    workspace_bytes = cuda_library.load().attention_bwd_workspace_bytes(
        VARIABLES, shape_numbers(call), variables(call), hardware.sm_count(q.device)
    )
    order = {"dq_in_order": dq_in_order(call.window, deterministic)}
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "dq": dq, "dk": dk, "dv": dv}
    return (
        copies,
        workspace_bytes,
        prepared("attention_bwd", call, ("lse", "dlse", "delta", "workspace"), order, **tensors),
    )
