"""LayerNorm with PyTorch's own kernels: every device and dtype, and what the others are measured against."""

import torch
from torch import Tensor

from ...torch_library import torch_op
from ..dropout import keep_mask
from .outputs import bwd_outputs, fwd_outputs


def unsupported(*_) -> str | None:
    return None


@torch_op(fake=fwd_outputs)
def layer_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual: (M, N), weight, bias: (N,), seed: (1,) -> y, h = dropout(x) + residual: (M, N), mean, rstd: (M,)"""
    if seed is not None:
        x_kept = x.float() * keep_mask(seed, x.shape[0], x.shape[1], dropout) / (1 - dropout)
    else:
        x_kept = x
    # h has a dtype of its own and is rounded to it once, as the other backends do.
    h = x if residual is None else (x_kept + residual).to(residual.dtype)
    # In float32 throughout: PyTorch's CPU kernel rounds the statistics of a bfloat16 row to bfloat16.
    y, mean, rstd = torch.native_layer_norm(
        h.float(), (x.shape[1],), weight.float(), None if bias is None else bias.float(), eps
    )
    return y.to(x.dtype), x.new_empty(0) if residual is None else h, mean.flatten(), rstd.flatten()


@torch_op(fake=bwd_outputs)
def layer_norm_bwd(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout: float,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dy, dh, h: (M, N), weight: (N,), mean, rstd: (M,) -> gradients of h, x: (M, N), weight, bias: (N,)"""
    grad_h, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        dy.float(),
        h.float(),
        (h.shape[1],),
        mean.unsqueeze(1),
        rstd.unsqueeze(1),
        weight.float(),
        torch.zeros_like(weight, dtype=torch.float32),
        [True, weight_grad, bias_grad],
    )
    grad_h = grad_h if dh is None else grad_h + dh
    grad_x = dy.new_empty(0)
    if seed is not None:
        grad_x = (grad_h * keep_mask(seed, h.shape[0], h.shape[1], dropout) / (1 - dropout)).to(dy.dtype)
    elif dy.dtype != h.dtype:
        grad_x = grad_h.to(dy.dtype)
    return (
        grad_h.to(h.dtype),
        grad_x,
        weight.new_empty(0) if grad_weight is None else grad_weight.to(weight.dtype),
        weight.new_empty(0) if grad_bias is None else grad_bias.to(weight.dtype),
    )
