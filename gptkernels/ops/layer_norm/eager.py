"""LayerNorm with PyTorch's own kernels: every device and dtype, and what the others are measured against."""

import torch
from torch import Tensor

from ...torch_library import torch_op
from ..dropout import dropped
from .outputs import bwd_outputs, fwd_outputs
from .record import LayerNormCall


def unsupported(*_) -> str | None:
    return None


@torch_op(fake=fwd_outputs)
def layer_norm_fwd(call: LayerNormCall) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """-> y, h = dropout(x) + residual: (M, N), mean, rstd: (M,)"""
    x, bias = call.x, call.bias
    h = with_residual(x, call.residual, call.seed, call.dropout)
    # In float32 throughout: PyTorch's CPU kernel rounds the statistics of a bfloat16 row to bfloat16.
    y, mean, rstd = torch.native_layer_norm(
        h.float(), (x.shape[1],), call.weight.float(), None if bias is None else bias.float(), call.eps
    )
    return y.to(x.dtype), None if call.residual is None else h, mean.flatten(), rstd.flatten()


def with_residual(x: Tensor, residual: Tensor | None, seed: Tensor | None, dropout: float) -> Tensor:
    """-> h = dropout(x) + residual: (M, N), which has a dtype of its own and is rounded to it once, as the other
    backends do"""
    if residual is None:
        return x
    kept = x if seed is None else dropped(x.float(), seed, dropout)
    return (kept + residual).to(residual.dtype)


def grad_of_x(grad_h: Tensor, dy: Tensor, h: Tensor, seed: Tensor | None, dropout: float) -> Tensor | None:
    """grad_h: (M, N) float32 -> (M, N) where it is another"""
    if seed is None and dy.dtype == h.dtype:
        return None
    return dropped(grad_h, seed, dropout).to(dy.dtype)


@torch_op(fake=bwd_outputs)
def layer_norm_bwd(
    call: LayerNormCall,
    dy: Tensor,
    dh: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dy, dh: (M, N), mean, rstd: (M,) -> gradients of h, x: (M, N), weight, bias: (N,)"""
    h, weight = call.x, call.weight
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
    grad_weight, grad_bias = (None if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias))
    return grad_h.to(h.dtype), grad_of_x(grad_h, dy, h, call.seed, call.dropout), grad_weight, grad_bias
