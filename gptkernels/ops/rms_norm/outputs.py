"""What the launchers return, allocated: shared by every backend, and by torch.compile as the fake implementation."""

import torch
from torch import Tensor

from .record import RMSNormCall


def fwd_outputs(call: RMSNormCall) -> tuple[Tensor, Tensor | None, Tensor]:
    """-> y like x, h like residual: both contiguous, rstd: (M,) in float32"""
    x, residual = call.x, call.residual
    h = None if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    rstd = torch.empty_strided((x.shape[:-1].numel(),), (1,), dtype=torch.float32, device=x.device)
    return torch.empty_like(x, memory_format=torch.contiguous_format), h, rstd


def bwd_outputs(
    call: RMSNormCall, dy: Tensor, dh: Tensor | None, rstd: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> gradients of h: like h, x: in dy's dtype if that differs, weight: (N,)"""
    h, weight = call.x, call.weight
    grad_h = torch.empty_like(h, memory_format=torch.contiguous_format)
    x_differs = call.dropout > 0 or dy.dtype != h.dtype
    grad_x = torch.empty(h.shape, dtype=dy.dtype, device=h.device) if x_differs else None
    return grad_h, grad_x, torch.empty_like(weight) if weight_grad and weight is not None else None
