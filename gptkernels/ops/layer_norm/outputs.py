"""What the launchers return, allocated: shared by every backend, and by torch.compile as the fake implementation.

Outputs that a call does not have are empty tensors, because a torch.library op cannot return None.
"""

import torch
from torch import Tensor


def fwd_outputs(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    eps: float,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual: (M, N) -> y: (M, N) in x's dtype, h: (M, N) in residual's, mean, rstd: (M,) in float32"""
    rows, columns = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if residual is None:
        h = torch.empty((0,), dtype=x.dtype, device=x.device)
    else:
        h = torch.empty((rows, columns), dtype=residual.dtype, device=x.device)
    mean = torch.empty((rows,), dtype=torch.float32, device=x.device)
    rstd = torch.empty((rows,), dtype=torch.float32, device=x.device)
    return y, h, mean, rstd


def bwd_outputs(
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
    """dy, h: (M, N) -> gradients of h: (M, N) in h's dtype, x: (M, N) in dy's if that differs, weight, bias: (N,)"""
    rows, columns = h.shape
    grad_h = torch.empty((rows, columns), dtype=h.dtype, device=h.device)
    x_differs = dropout > 0 or dy.dtype != h.dtype
    grad_x = torch.empty((rows, columns) if x_differs else (0,), dtype=dy.dtype, device=h.device)
    grad_weight = torch.empty((columns if weight_grad else 0,), dtype=weight.dtype, device=h.device)
    grad_bias = torch.empty((columns if bias_grad else 0,), dtype=weight.dtype, device=h.device)
    return grad_h, grad_x, grad_weight, grad_bias
