"""RMSNorm in CUDA C++: LayerNorm's kernels (csrc/layer_norm) without a mean and a bias."""

import torch
from torch import Tensor

from ... import cuda_library, hardware
from ...cuda_library import Launch
from ...remembered import remembered
from ...torch_library import torch_op
from ..layer_norm.cuda_kernels import BWD_TENSORS, bwd_numbers, fwd_numbers, unsupported
from ..rows import group_stride, zero_
from .outputs import bwd_outputs, fwd_outputs
from .record import RMSNormCall

__all__ = ["rms_norm_bwd", "rms_norm_fwd", "unsupported"]

FWD_TENSORS = ("x", "residual", "weight", "seed", "y", "h", "rstd")


def options(call: RMSNormCall) -> dict:
    """Without a weight the kernels take one of zeros, and 1 as what is added to it."""
    return {
        "offset": 1.0 if call.weight is None else call.offset,
        "group_rows": call.x.shape[1] if call.x.ndim == 3 else 0,
    }


@torch_op(fake=fwd_outputs)
def rms_norm_fwd(call: RMSNormCall) -> tuple[Tensor, Tensor | None, Tensor]:
    """-> y, h = dropout(x) + residual: like x, rstd: (M,)"""
    outputs = fwd_outputs(call)
    if call.x.numel():
        fwd_launch(call)(call.x, call.residual, call.weight, call.seed, *outputs)
    return outputs


@remembered
def fwd_launch(call: RMSNormCall) -> Launch:
    own = {"x_group_stride": group_stride(call.x), "cast_first": call.cast_first, **options(call)}
    return Launch("rms_norm_fwd", call.x.device, FWD_TENSORS, fwd_numbers(call) | own)


@torch_op(fake=bwd_outputs)
def rms_norm_bwd(
    call: RMSNormCall, dy: Tensor, dh: Tensor | None, rstd: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy: like h, dh: (M, N), rstd: (M,) -> gradients of h, x: like h, weight: (N,)"""
    grads = grad_h, grad_x, grad_weight = bwd_outputs(call, dy, dh, rstd, weight_grad)
    if dy.numel() == 0:
        zero_(grads)
        return grads
    launch, partials_shape = bwd_launch(call, dy, dh)
    partials = None
    if grad_weight is not None:
        partials = torch.empty(partials_shape, dtype=torch.float32, device=dy.device)
    launch(dy, dh, call.x, call.weight, None, rstd, call.seed, grad_h, grad_x, partials, grad_weight, None)
    return grads


@remembered
def bwd_launch(call: RMSNormCall, dy: Tensor, dh: Tensor | None) -> tuple[Launch, tuple[int, int]]:
    """-> with the shape of the partial gradients"""
    rows, columns = dy.shape[:-1].numel(), dy.shape[-1]
    partial_rows = cuda_library.load().rms_norm_bwd_partial_rows(rows, columns, hardware.sm_count(dy.device))
    own = {"dy_group_stride": group_stride(dy), "h_group_stride": group_stride(call.x), **options(call)}
    numbers = bwd_numbers(call, dy, dh, partial_rows) | own
    return Launch("rms_norm_bwd", dy.device, BWD_TENSORS, numbers), (partial_rows, columns)
