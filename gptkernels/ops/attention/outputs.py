"""What the launchers return, allocated: shared by every backend, and by torch.compile as the fake implementation."""

import torch
from torch import Tensor


def empty_in_order_of(x: Tensor) -> Tensor:
    """x: (..., D), any strides -> a dense tensor of x's shape, dtype and order of dimensions in memory, D innermost"""
    dense = torch.empty_like(x)
    if dense.stride(-1) == 1:
        return dense
    strides = x.stride()
    order = sorted(range(x.dim() - 1), key=lambda i: -strides[i]) + [x.dim() - 1]
    dense = torch.empty([x.shape[i] for i in order], dtype=x.dtype, device=x.device)
    return dense.permute([order.index(i) for i in range(x.dim())])


def fwd_outputs(
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
    """q: (B, H, Tq, D) or (T, H, D) -> out: as q, lse: (B, H, Tq) or (H, T) float32"""
    shape = q.shape[:-1] if cu_seqlens is None else (q.shape[1], q.shape[0])
    return empty_in_order_of(q), torch.empty(shape, dtype=torch.float32, device=q.device)


def bwd_outputs(
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
    """q, k, v -> their gradients, in their memory order"""
    return empty_in_order_of(q), empty_in_order_of(k), empty_in_order_of(v)


def decode_outputs(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, window: int | None, scale: float
) -> Tensor:
    """q: (B, H, Tq, D) -> out: as q"""
    return empty_in_order_of(q)
