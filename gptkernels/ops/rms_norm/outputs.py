"""What the launchers return, allocated: shared by every backend, and by torch.compile as the fake implementation.

Outputs that a call does not have are empty tensors, because a torch.library op cannot return None.
"""

import torch
from torch import Tensor


def fwd_outputs(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    seed: Tensor | None,
    eps: float,
    offset: float,
    cast_first: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual: (M, N) or x: (G, R, N) -> y like x, h like residual: both contiguous, rstd: (M,) in float32"""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if residual is None:
        h = torch.empty((0,), dtype=x.dtype, device=x.device)
    else:
        h = torch.empty_like(residual, memory_format=torch.contiguous_format)
    return y, h, torch.empty((x.shape[:-1].numel(),), dtype=torch.float32, device=x.device)


def bwd_outputs(
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
    """dy, h: (M, N) or (G, R, N) -> gradients of h: like h, x: in dy's dtype if that differs, weight: (N,)"""
    grad_h = torch.empty_like(h, memory_format=torch.contiguous_format)
    x_differs = dropout > 0 or dy.dtype != h.dtype
    grad_x = torch.empty(h.shape if x_differs else (0,), dtype=dy.dtype, device=h.device)
    columns = h.shape[-1] if weight_grad else 0
    grad_weight = torch.empty((columns,), dtype=h.dtype if weight is None else weight.dtype, device=h.device)
    return grad_h, grad_x, grad_weight
