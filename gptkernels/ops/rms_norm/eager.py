"""RMSNorm with PyTorch's own kernels: every device and dtype, and what the others are measured against."""

import torch
from torch import Tensor

from ...torch_library import torch_op
from ..layer_norm.eager import grad_of_x, with_residual
from .outputs import bwd_outputs, fwd_outputs
from .record import RMSNormCall


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
        scale = weight.float() + offset if offset else weight
        # In place where that is the same: new memory takes as long as the product.
        y = y.mul_(scale) if torch.result_type(y, scale) == y.dtype else y * scale
    return y.to(dtype), rstd


@torch_op(fake=fwd_outputs)
def rms_norm_fwd(call: RMSNormCall) -> tuple[Tensor, Tensor | None, Tensor]:
    """-> y, h = dropout(x) + residual: like x, rstd: (M,)"""
    h = with_residual(call.x, call.residual, call.seed, call.dropout)
    y, rstd = normalised(h, call.weight, call.eps, call.offset, call.cast_first, call.x.dtype)
    return y.contiguous(), None if call.residual is None else h.contiguous(), rstd.flatten()


@torch_op(fake=bwd_outputs)
def rms_norm_bwd(
    call: RMSNormCall, dy: Tensor, dh: Tensor | None, rstd: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy: like h, dh: (M, N), rstd: (M,) -> gradients of h, x: like h, weight: (N,)"""
    h, weight = call.x, call.weight
    dy_rows, h_rows, rstd = dy.float().reshape(-1, dy.shape[-1]), h.float().reshape(-1, h.shape[-1]), rstd.unsqueeze(1)
    scale = h_rows.new_ones(h.shape[-1]) if weight is None else weight.float() + call.offset
    # LayerNorm's backward with means of zero, and what that takes off for the means put back: one pass over memory.
    grad_h, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
        dy_rows, h_rows, scale.shape, torch.zeros_like(rstd), rstd, scale, None, [True, weight_grad, False]
    )
    grad_h = grad_h.addcmul_((dy_rows @ scale).unsqueeze(1), rstd, value=1 / scale.numel()).view(h.shape)
    grad_h = grad_h if dh is None else grad_h + dh
    grad_x = grad_of_x(grad_h, dy, h, call.seed, call.dropout)
    return grad_h.to(h.dtype), grad_x, None if grad_weight is None or weight is None else grad_weight.to(weight.dtype)
