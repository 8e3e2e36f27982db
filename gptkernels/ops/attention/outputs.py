"""What the launchers return, allocated: shared by every backend, and by torch.compile as the fake implementation."""

import torch
from torch import Tensor

from .record import AttentionCall, DecodeCall


def empty_in_order_of(x: Tensor) -> Tensor:
    """x: (..., D), any strides -> a dense tensor of x's shape, dtype and order of dimensions in memory, D innermost"""
    dense = torch.empty_like(x)
    if dense.stride(-1) == 1:
        return dense
    strides = x.stride()
    order = sorted(range(x.dim() - 1), key=lambda i: -strides[i]) + [x.dim() - 1]
    dense = torch.empty([x.shape[i] for i in order], dtype=x.dtype, device=x.device)
    return dense.permute([order.index(i) for i in range(x.dim())])


def fwd_outputs(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """-> out: as q, lse: (B, H, Tq) or (H, T) float32"""
    q = call.q
    shape = q.shape[:-1] if call.cu_seqlens is None else (q.shape[1], q.shape[0])
    return empty_in_order_of(q), torch.empty(shape, dtype=torch.float32, device=q.device)


def bwd_outputs(
    call: AttentionCall, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """-> gradients of q, k, v, in their memory order, and of sinks"""
    dq, dk, dv = (empty_in_order_of(x) for x in (call.q, call.k, call.v))
    return dq, dk, dv, None if call.sinks is None else torch.empty_like(call.sinks)


def decode_outputs(call: DecodeCall) -> Tensor:
    """-> out: as q"""
    return empty_in_order_of(call.q)
