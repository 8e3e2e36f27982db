"""LayerNorm in CUDA C++ (csrc/layer_norm): compute capability 8.0 and up."""

import torch
from torch import Tensor

from ... import cuda_library, hardware
from ...torch_library import torch_op
from ..dropout import threshold
from .outputs import bwd_outputs, fwd_outputs
from .record import NormCall

MAX_COLUMNS = 65536


def unsupported(call: NormCall) -> str | None:
    x = call.x
    if x.shape[-1] > MAX_COLUMNS:
        return f"takes rows of up to {MAX_COLUMNS} elements, not {x.shape[-1]}"
    return cuda_library.unsupported(x.device)


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
    outputs = y, h, mean, rstd = fwd_outputs(x, residual, weight, bias, seed, eps, dropout)
    rows, columns = x.shape
    if rows == 0:
        return outputs
    fields = {
        "x": x,
        "residual": residual,
        "weight": weight,
        "bias": bias,
        "seed": seed,
        "y": y,
        "h": None if residual is None else h,
        "mean": mean,
        "rstd": rstd,
        "rows": rows,
        "columns": columns,
        "x_stride": x.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0),
        "eps": eps,
        "keep_scale": 1 / (1 - dropout),
        "drop_below": threshold(dropout),
        "x_dtype": cuda_library.DTYPE[x.dtype],
        "residual_is_float": residual is not None and residual.dtype == torch.float32,
        "weight_is_float": weight.dtype == torch.float32,
    }
    cuda_library.launch("layer_norm_fwd", x.device, fields)
    return outputs


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
    outputs = grad_h, grad_x, grad_weight, grad_bias = bwd_outputs(
        dy, dh, h, weight, mean, rstd, seed, dropout, weight_grad, bias_grad
    )
    rows, columns = h.shape
    if rows == 0:
        grad_weight.zero_(), grad_bias.zero_()
        return outputs
    partial_rows = cuda_library.load().layer_norm_bwd_partial_rows(rows, columns, hardware.sm_count(h.device))
    partials = None
    if weight_grad or bias_grad:
        partials = torch.empty((2, partial_rows, columns), dtype=torch.float32, device=h.device)
    fields = {
        "dy": dy,
        "dh": dh,
        "h": h,
        "weight": weight,
        "mean": mean,
        "rstd": rstd,
        "seed": seed,
        "grad_h": grad_h,
        "grad_x": grad_x if grad_x.ndim == 2 else None,
        "partials": partials,
        "grad_weight": grad_weight if weight_grad else None,
        "grad_bias": grad_bias if bias_grad else None,
        "rows": rows,
        "columns": columns,
        "partial_rows": partial_rows,
        "dy_stride": dy.stride(0),
        "dh_stride": 0 if dh is None else dh.stride(0),
        "h_stride": h.stride(0),
        "keep_scale": 1 / (1 - dropout),
        "drop_below": threshold(dropout),
        "x_dtype": cuda_library.DTYPE[dy.dtype],
        "h_is_float": h.dtype == torch.float32,
        "weight_is_float": weight.dtype == torch.float32,
    }
    cuda_library.launch("layer_norm_bwd", h.device, fields)
    return outputs
