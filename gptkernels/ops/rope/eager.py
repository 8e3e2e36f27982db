"""The rotation with PyTorch's own kernels: every device and dtype, and what the others are measured against."""

import torch
from torch import Tensor

from ...torch_library import torch_op
from .outputs import fwd_outputs
from .record import RopeCall
from .reference import halves


def unsupported(call: RopeCall) -> str | None:
    return None


@torch_op(fake=fwd_outputs)
def rope_fwd(call: RopeCall) -> tuple[Tensor, Tensor]:
    """-> q, k rotated, in their memory order"""
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
