"""LayerNorm in CUDA C++ (csrc/layer_norm): compute capability 8.0 and up."""

import torch
from torch import Tensor

from ... import cuda_library, hardware
from ...cuda_library import Launch
from ...records import Record
from ...remembered import remembered
from ...torch_library import torch_op
from ..dropout import threshold
from ..rows import zero_
from .outputs import bwd_outputs, fwd_outputs
from .record import LayerNormCall

MAX_COLUMNS = 65536
# The tensors that a launch takes, in this order
FWD_TENSORS = ("x", "residual", "weight", "bias", "seed", "y", "h", "mean", "rstd")
BWD_TENSORS = (
    *("dy", "dh", "h", "weight", "mean", "rstd", "seed", "grad_h", "grad_x", "partials", "grad_weight", "grad_bias"),
)


def unsupported(call: Record) -> str | None:
    """Also of RMSNorm's calls"""
    x = call.first
    if x.shape[-1] > MAX_COLUMNS:
        return f"takes rows of up to {MAX_COLUMNS} elements, not {x.shape[-1]}"
    return cuda_library.unsupported(x.device)


@torch_op(fake=fwd_outputs)
def layer_norm_fwd(call: LayerNormCall) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """-> y, h = dropout(x) + residual: (M, N), mean, rstd: (M,)"""
    outputs = fwd_outputs(call)
    if call.x.shape[0]:
        fwd_launch(call)(call.x, call.residual, call.weight, call.bias, call.seed, *outputs)
    return outputs


@remembered
def fwd_launch(call: LayerNormCall) -> Launch:
    return Launch("layer_norm_fwd", call.x.device, FWD_TENSORS, fwd_numbers(call))


def fwd_numbers(call) -> dict:
    """csrc/layer_norm/layer_norm.h's NormFwdParams, also of RMSNorm's calls"""
    x, residual, weight = call.x, call.residual, call.weight
    return {
        "rows": x.shape[:-1].numel(),
        "columns": x.shape[-1],
        "x_stride": x.stride(-2),
        "residual_stride": 0 if residual is None else residual.stride(0),
        "eps": call.eps,
        "keep_scale": 1 / (1 - call.dropout),
        "drop_below": threshold(call.dropout),
        "x_dtype": cuda_library.DTYPE[x.dtype],
        "residual_is_float": residual is not None and residual.dtype == torch.float32,
        "weight_is_float": weight is not None and weight.dtype == torch.float32,
    }


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
    grads = bwd_outputs(call, dy, dh, mean, rstd, weight_grad, bias_grad)
    if call.x.shape[0] == 0:
        zero_(grads)
        return grads
    launch, partials_shape = bwd_launch(call, dy, dh)
    partials = None
    if weight_grad or bias_grad:
        partials = torch.empty(partials_shape, dtype=torch.float32, device=dy.device)
    launch(dy, dh, call.x, call.weight, mean, rstd, call.seed, *grads[:2], partials, *grads[2:])
    return grads


@remembered
def bwd_launch(call: LayerNormCall, dy: Tensor, dh: Tensor | None) -> tuple[Launch, tuple[int, ...]]:
    """-> with the shape of the partial gradients"""
    rows, columns = call.x.shape
    partial_rows = cuda_library.load().layer_norm_bwd_partial_rows(rows, columns, hardware.sm_count(dy.device))
    launch = Launch("layer_norm_bwd", dy.device, BWD_TENSORS, bwd_numbers(call, dy, dh, partial_rows))
    return launch, (2, partial_rows, columns)


def bwd_numbers(call, dy: Tensor, dh: Tensor | None, partial_rows: int) -> dict:
    """csrc/layer_norm/layer_norm.h's LayerNormBwdParams, also of RMSNorm's calls"""
    h, weight = call.x, call.weight
    return {
        "rows": h.shape[:-1].numel(),
        "columns": h.shape[-1],
        "partial_rows": partial_rows,
        "dy_stride": dy.stride(-2),
        "dh_stride": 0 if dh is None else dh.stride(0),
        "h_stride": h.stride(-2),
        "keep_scale": 1 / (1 - call.dropout),
        "drop_below": threshold(call.dropout),
        "x_dtype": cuda_library.DTYPE[dy.dtype],
        "h_is_float": h.dtype == torch.float32,
        "weight_is_float": weight is not None and weight.dtype == torch.float32,
    }
