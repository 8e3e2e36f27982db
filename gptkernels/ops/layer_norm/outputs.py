"""What the launchers return, allocated: shared by every backend, and by torch.compile as the fake implementation."""

import torch
from torch import Tensor

from .record import LayerNormCall


def fwd_outputs(call: LayerNormCall) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """-> y: (M, N) in x's dtype, h: (M, N) in residual's, mean, rstd: (M,) in float32"""
    x, residual = call.x, call.residual
    h = None if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    y, rows = torch.empty_like(x, memory_format=torch.contiguous_format), x.shape[:1]
    mean = torch.empty_strided(rows, (1,), dtype=torch.float32, device=x.device)
    return y, h, mean, torch.empty_like(mean)


def bwd_outputs(
    call: LayerNormCall,
    dy: Tensor,
    dh: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """-> gradients of h: (M, N) in h's dtype, x: (M, N) in dy's if that differs, weight, bias: (N,)"""
    h, weight = call.x, call.weight
    grad_h = torch.empty_like(h, memory_format=torch.contiguous_format)
    x_differs = call.dropout > 0 or dy.dtype != h.dtype
    grad_x = torch.empty(h.shape, dtype=dy.dtype, device=h.device) if x_differs else None
    grad_weight, grad_bias = (torch.empty_like(weight) if wanted else None for wanted in (weight_grad, bias_grad))
    return grad_h, grad_x, grad_weight, grad_bias
