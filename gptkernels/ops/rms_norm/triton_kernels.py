"""RMSNorm in Triton: launches of LayerNorm's kernels."""

import torch
import triton
from torch import Tensor

from ... import hardware
from ...remembered import remembered
from ...torch_library import torch_op
from ...triton_calls import Launch
from ..dropout import threshold
from ..layer_norm.triton_kernels import (
    BWD_DROPOUT_LAUNCH,
    BWD_LAUNCH,
    FWD_LAUNCH,
    REDUCE_LAUNCH,
    launch_row,
    unsupported,
)
from ..layer_norm.triton_rows import layer_norm_bwd_kernel, layer_norm_bwd_reduce_kernel, layer_norm_fwd_kernel
from ..rows import group_stride
from .outputs import bwd_outputs, fwd_outputs
from .record import RMSNormCall

__all__ = ["rms_norm_bwd", "rms_norm_fwd", "unsupported"]


@torch_op(fake=fwd_outputs)
def rms_norm_fwd(call: RMSNormCall) -> tuple[Tensor, Tensor | None, Tensor]:
    """-> y, h = dropout(x) + residual: like x, rstd: (M,)"""
    outputs = y, h, rstd = fwd_outputs(call)
    if rstd.shape[0] == 0:
        return outputs
    x, residual = call.x, call.x if call.residual is None else call.residual
    launch = fwd_launch(call)
    with hardware.on_device(x.device):
        seed = rstd if call.seed is None else call.seed
        launch(x, residual, call.weight, x, seed, y, y if h is None else h, None, rstd)
    return outputs


@remembered
def fwd_launch(call: RMSNormCall) -> Launch:
    x, residual, dropout = call.x, call.residual, call.dropout
    rows, columns = x.shape[:-1].numel(), x.shape[-1]
    row = launch_row(FWD_LAUNCH, "rms_norm_fwd", "rms_norm" if residual is None else "add_rms_norm", call)
    residual_stride = 0 if residual is None else residual.stride(0)
    grouped = x.ndim == 3
    return Launch(
        layer_norm_fwd_kernel,
        (triton.cdiv(rows, row["ROWS"]),),
        (
            *(rows, columns, x.stride(-2), group_stride(x), x.shape[-2] if grouped else 0, residual_stride),
            *(call.eps, call.offset, threshold(dropout), 1 / (1 - dropout)),
        ),
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=False,
        HAS_DROPOUT=dropout > 0,
        RMS=True,
        CAST_FIRST=call.cast_first and x.dtype != torch.float32,
        GROUPED=grouped,
        **row,
    )


@torch_op(fake=bwd_outputs)
def rms_norm_bwd(
    call: RMSNormCall, dy: Tensor, dh: Tensor | None, rstd: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy: like h, dh: (M, N), rstd: (M,) -> gradients of h, x: like h, weight: (N,)"""
    grads = grad_h, grad_x, grad_weight = bwd_outputs(call, dy, dh, rstd, weight_grad)
    if rstd.shape[0] == 0:
        return grad_h, grad_x, None if grad_weight is None else grad_weight.zero_()
    h = call.x
    launch, reduce, partials_shape = bwd_launches(call, dy, dh, grad_weight is not None)
    allocate = torch.empty if launch.constants["WHOLE_ROW"] else torch.zeros
    partials = allocate(partials_shape, dtype=torch.float32, device=h.device)
    seed, other = rstd if call.seed is None else call.seed, grad_h if grad_x is None else grad_x
    with hardware.on_device(h.device):
        launch(dy, dy if dh is None else dh, h, call.weight, None, rstd, seed, grad_h, other, partials)
        if grad_weight is not None:
            reduce(partials, grad_weight, grad_weight)
    return grads


@remembered
def bwd_launches(
    call: RMSNormCall, dy: Tensor, dh: Tensor | None, weight_grad: bool
) -> tuple[Launch, Launch, tuple[int, ...]]:
    """-> of the gradients and of the sum over the programs' partial ones, and the shape of those"""
    h, dropout = call.x, call.dropout
    rows, columns = h.shape[:-1].numel(), h.shape[-1]
    op = "rms_norm" if dh is None else "add_rms_norm"
    row = launch_row(BWD_DROPOUT_LAUNCH if dropout else BWD_LAUNCH, "rms_norm_bwd", op, call)
    programs = min(triton.cdiv(rows, row["ROWS"]), 4 * hardware.sm_count(h.device))
    dh_stride = 0 if dh is None else dh.stride(0)
    grouped = h.ndim == 3
    gradients = Launch(
        layer_norm_bwd_kernel,
        (programs,),
        (
            *(rows, columns, dy.stride(-2), group_stride(dy), dh_stride, h.stride(-2), group_stride(h)),
            *(h.shape[-2] if grouped else 0, call.offset, threshold(dropout), 1 / (1 - dropout)),
        ),
        HAS_DH=dh is not None,
        HAS_GRAD_X=dropout > 0 or dy.dtype != h.dtype,
        HAS_DROPOUT=dropout > 0,
        HAS_PARTIALS=weight_grad,
        RMS=True,
        GROUPED=grouped,
        **row,
    )
    reduce = Launch(
        layer_norm_bwd_reduce_kernel,
        (triton.cdiv(columns, REDUCE_LAUNCH["BLOCK_N"]),),
        (programs, columns),
        HAS_WEIGHT=True,
        HAS_BIAS=False,
        **REDUCE_LAUNCH,
    )
    return gradients, reduce, (1, programs, columns) if weight_grad else (0,)
