"""RMSNorm in Triton: launches of LayerNorm's kernels."""

import torch
from torch import Tensor

from ... import hardware
from ...remembered import remembered
from ...torch_library import torch_op
from ...triton_calls import Launch
from ..layer_norm.triton_kernels import norm_bwd_launches, norm_fwd_launch, unsupported
from ..rows import zero_
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
    cast_first = call.cast_first and call.x.dtype != torch.float32
    return norm_fwd_launch("rms_norm", call, call.offset, HAS_BIAS=False, RMS=True, CAST_FIRST=cast_first)


@torch_op(fake=bwd_outputs)
def rms_norm_bwd(
    call: RMSNormCall, dy: Tensor, dh: Tensor | None, rstd: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy: like h, dh: (M, N), rstd: (M,) -> gradients of h, x: like h, weight: (N,)"""
    grads = grad_h, grad_x, grad_weight = bwd_outputs(call, dy, dh, rstd, weight_grad)
    if rstd.shape[0] == 0:
        zero_(grads)
        return grads
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
    return norm_bwd_launches("rms_norm", call, dy, dh, weight_grad, False, rms=True, offset=call.offset)
