"""The rotation with PyTorch's own kernels: every device and dtype, and what the others are measured against."""

import torch
from torch import Tensor

from ...torch_library import torch_op
from ..rms_norm import eager as rms_norm
from ..rms_norm.record import RMSNormCall
from .outputs import fwd_outputs, norm_bwd_outputs, norm_fwd_outputs
from .record import NormRopeCall, RopeCall
from .reference import halves


def unsupported(call: RopeCall | NormRopeCall) -> str | None:
    return None


@torch_op(fake=fwd_outputs)
def rope_fwd(call: RopeCall) -> tuple[Tensor, Tensor]:
    """-> q, k rotated, in their memory order"""
    return rotated(call)


def rotated(call: RopeCall) -> tuple[Tensor, Tensor]:
    outputs = fwd_outputs(call)
    whole = call.cos.shape[-1] == call.rotated
    tables = [t.to(call.q.dtype).unsqueeze(-3) for t in (call.cos, call.sin)]
    (cos_1, cos_2), (sin_1, sin_2) = (halves(t, call.interleaved) if whole else (t, t) for t in tables)
    sign = 1
    if call.transposed:
        sin_1, sin_2, sign = sin_2, sin_1, -1
    for x, out in zip((call.q, call.k), outputs, strict=True):
        (x_1, x_2), (y_1, y_2) = (halves(each[..., : call.rotated], call.interleaved) for each in (x, out))
        torch.mul(x_1, cos_1, out=y_1).addcmul_(x_2, sin_1, value=-sign)
        torch.mul(x_2, cos_2, out=y_2).addcmul_(x_1, sin_2, value=sign)
        out[..., call.rotated :] = x[..., call.rotated :]
    return outputs


@torch_op(fake=norm_fwd_outputs)
def rope_norm_fwd(call: NormRopeCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> q, k normalised and rotated, in their memory order, and 1 / rms of each head"""
    options = call.eps, call.offset, call.cast_first, call.q.dtype
    (q, q_rstd), (k, k_rstd) = (
        rms_norm.normalised(x, weight, *options) for x, weight in ((call.q, call.q_norm), (call.k, call.k_norm))
    )
    rstds = q_rstd.squeeze(-1).contiguous(), k_rstd.squeeze(-1).contiguous()
    q, k = rotated(RopeCall(q, k, call.cos, call.sin, call.rotated, call.interleaved))
    return q, k, *rstds


@torch_op(fake=norm_bwd_outputs)
def rope_norm_bwd(
    call: NormRopeCall, dq: Tensor, dk: Tensor, q_rstd: Tensor, k_rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of q, k, q_norm, k_norm"""
    back = rotated(RopeCall(dq, dk, call.cos, call.sin, call.rotated, call.interleaved, transposed=True))
    found = []
    for x, weight, dy, rstd in zip((call.q, call.k), (call.q_norm, call.k_norm), back, (q_rstd, k_rstd), strict=True):
        norm = RMSNormCall(x, None, weight, None, call.eps, call.offset, call.cast_first, 0.0)
        found.append(rms_norm.rms_norm_bwd(norm, dy, None, rstd.flatten(), True))
    grads = norm_bwd_outputs(call, dq, dk, q_rstd, k_rstd)
    for grad, source in zip(grads, (found[0][0], found[1][0], found[0][2], found[1][2]), strict=True):
        grad.copy_(source)
    return grads
