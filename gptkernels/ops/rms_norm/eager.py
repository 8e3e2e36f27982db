"""RMSNorm with PyTorch's own kernels: every device and dtype, and what the others are measured against."""

import torch
from torch import Tensor

from ...torch_library import torch_op
from ..dropout import keep_mask
from .outputs import bwd_outputs, fwd_outputs


def unsupported(*_) -> str | None:
    return None


def normalised(
    h: Tensor, weight: Tensor | None, eps: float, offset: float, cast_first: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """h: (..., N), weight: (N,) -> y: (..., N) in dtype, rstd: (..., 1), rounded where the models' own code rounds"""
    wide = h.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = wide * rstd
    if weight is None or cast_first:
        y = y.to(dtype)
    if weight is not None:
        y = y * (weight.float() + offset if offset else weight)
    return y.to(dtype), rstd


@torch_op(fake=fwd_outputs)
def rms_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual: (M, N) or x: (G, R, N), weight: (N,), seed: (1,) -> y, h = dropout(x) + residual, rstd: (M,)"""
    if seed is not None:
        x_kept = x.float() * keep_mask(seed, x.shape[0], x.shape[1], dropout) / (1 - dropout)
    else:
        x_kept = x
    # h has a dtype of its own and is rounded to it once, as the other backends do.
    h = x if residual is None else (x_kept + residual).to(residual.dtype)
    y, rstd = normalised(h, weight, eps, offset, cast_first, x.dtype)
    return y.contiguous(), x.new_empty(0) if residual is None else h.contiguous(), rstd.flatten()


@torch_op(fake=bwd_outputs)
def rms_norm_bwd(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    seed: Tensor | None,
    offset: float,
    dropout: float,
    weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, dh, h: (M, N) or dy, h: (G, R, N), weight: (N,), rstd: (M,) -> gradients of h, x: like h, weight: (N,)"""
    dy_rows, h_rows, rstd = dy.float().reshape(-1, dy.shape[-1]), h.float().reshape(-1, h.shape[-1]), rstd.unsqueeze(1)
    scale = h_rows.new_ones(h.shape[-1]) if weight is None else weight.float() + offset
    # LayerNorm's backward with means of zero, and what that takes off for the means put back: one pass over memory.
    grad_h, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
        dy_rows, h_rows, scale.shape, torch.zeros_like(rstd), rstd, scale, None, [True, weight_grad, False]
    )
    grad_h = grad_h.addcmul_((dy_rows @ scale).unsqueeze(1), rstd, value=1 / scale.numel()).view(h.shape)
    grad_h = grad_h if dh is None else grad_h + dh
    grad_x = dy.new_empty(0)
    if seed is not None:
        grad_x = (grad_h * keep_mask(seed, h.shape[0], h.shape[1], dropout) / (1 - dropout)).to(dy.dtype)
    elif dy.dtype != h.dtype:
        grad_x = grad_h.to(dy.dtype)
    grad_weight = h_rows.new_empty(0) if grad_weight is None else grad_weight
    return grad_h.to(h.dtype), grad_x, grad_weight.to(h.dtype if weight is None else weight.dtype)
