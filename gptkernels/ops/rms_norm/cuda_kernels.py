"""RMSNorm in CUDA C++: LayerNorm's kernels (csrc/layer_norm) without a mean and a bias."""

import torch
from torch import Tensor

from ... import cuda_library, hardware
from ...torch_library import torch_op
from ..dropout import threshold
from ..layer_norm.cuda_kernels import unsupported
from ..rows import group_stride
from .outputs import bwd_outputs, fwd_outputs

__all__ = ["rms_norm_bwd", "rms_norm_fwd", "unsupported"]


def options(x: Tensor, weight: Tensor | None, offset: float) -> dict:
    """x: (M, N) or (G, R, N). Without a weight the kernels take one of zeros, and 1 as what is added to it."""
    return {"offset": 1.0 if weight is None else offset, "group_rows": x.shape[1] if x.ndim == 3 else 0}


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
    outputs = y, h, rstd = fwd_outputs(x, residual, weight, seed, eps, offset, cast_first, dropout)
    if rstd.shape[0] == 0:
        return outputs
    fields = {
        "x": x,
        "residual": residual,
        "weight": weight,
        "seed": seed,
        "y": y,
        "h": None if residual is None else h,
        "rstd": rstd,
        "rows": rstd.shape[0],
        "columns": x.shape[-1],
        "x_stride": x.stride(-2),
        "residual_stride": 0 if residual is None else residual.stride(0),
        "eps": eps,
        "keep_scale": 1 / (1 - dropout),
        "drop_below": threshold(dropout),
        "x_dtype": cuda_library.DTYPE[x.dtype],
        "residual_is_float": residual is not None and residual.dtype == torch.float32,
        "weight_is_float": weight is not None and weight.dtype == torch.float32,
        "x_group_stride": group_stride(x),
        "cast_first": cast_first,
        **options(x, weight, offset),
    }
    cuda_library.launch("rms_norm_fwd", x.device, fields)
    return outputs


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
    outputs = grad_h, grad_x, grad_weight = bwd_outputs(dy, dh, h, weight, rstd, seed, offset, dropout, weight_grad)
    rows, columns = rstd.shape[0], h.shape[-1]
    if rows == 0:
        grad_weight.zero_()
        return outputs
    partial_rows = cuda_library.load().rms_norm_bwd_partial_rows(rows, columns, hardware.sm_count(h.device))
    partials = None
    if weight_grad:
        partials = torch.empty((partial_rows, columns), dtype=torch.float32, device=h.device)
    fields = {
        "dy": dy,
        "dh": dh,
        "h": h,
        "weight": weight,
        "mean": None,
        "rstd": rstd,
        "seed": seed,
        "grad_h": grad_h,
        "grad_x": grad_x if grad_x.ndim == h.ndim else None,
        "partials": partials,
        "grad_weight": grad_weight if weight_grad else None,
        "grad_bias": None,
        "rows": rows,
        "columns": columns,
        "partial_rows": partial_rows,
        "dy_stride": dy.stride(-2),
        "dh_stride": 0 if dh is None else dh.stride(0),
        "h_stride": h.stride(-2),
        "keep_scale": 1 / (1 - dropout),
        "drop_below": threshold(dropout),
        "x_dtype": cuda_library.DTYPE[dy.dtype],
        "h_is_float": h.dtype == torch.float32,
        "weight_is_float": weight is not None and weight.dtype == torch.float32,
        "dy_group_stride": group_stride(dy),
        "h_group_stride": group_stride(h),
        **options(h, weight, offset),
    }
    cuda_library.launch("rms_norm_bwd", h.device, fields)
    return outputs
