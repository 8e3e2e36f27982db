"""Rotary position embedding of queries and keys, in one launch."""

import torch
from torch import Tensor

from ...dispatch import Call, op
from ...records import with_key
from ...torch_library import apply, first_order_only
from .. import checks
from ..rms_norm.native import CASTS
from ..rms_norm.op import check_weight
from . import eager, triton_kernels
from .record import NormRopeCall, RopeCall

BACKENDS = {"triton": triton_kernels, "eager": eager}


@op()
def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast: str = "llama",
    backend: str = "auto",
) -> Call[tuple[Tensor, Tensor]]:
    """-> q, k with the first `rotary_dim` dimensions of each head rotated by its token's angles, the others as they are

    q: (B, H, T, D), k: (B, Hkv, T, D), any strides with a contiguous last dimension (else copied once) -> the same
    shapes in the same memory order. cos, sin: (T, W) or (B, T, W) in any float dtype, used in q's, with YaRN's
    attention_scaling inside them where there is one; they get no gradient.

    rotary_dim: R, even and at most D; by default as wide as the tables. W is R, or R / 2 where the two dimensions of a
        pair share an angle, as in gpt-oss.
    interleaved: pairs are neighbours (0 and 1, 2 and 3, ...: GPT-J, Cohere); else dimension i goes with i + R / 2.
    q_norm, k_norm: (D,), the weights of RMSNorms of each head before the rotation (QK-norm), in the same pass. eps,
        offset and cast are theirs, as gptkernels.rms_norm has them. Without them rope can be differentiated again.
    """

    def check():
        check_heads(q, k)
        check_tables(q, cos, sin, rotary_dim)
        checks.check_flags(interleaved=interleaved)
        check_norms(q, q_norm, k_norm, eps, offset, cast)

    def record():
        dense = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin)]
        rotated = cos.shape[-1] if rotary_dim is None else rotary_dim
        plain = RopeCall(dense[0], dense[1], dense[2], dense[3], rotated, interleaved)
        if q_norm is None or k_norm is None:
            return plain
        norms = q_norm.contiguous(), k_norm.contiguous()
        sizes, rounding = (float(eps), float(offset)), CASTS[cast]
        return NormRopeCall(dense[0], dense[1], dense[2], dense[3], *norms, rotated, interleaved, *sizes, rounding)

    def run(kernels, call):
        function = RopeFunction if q_norm is None else NormRopeFunction
        return apply(function, kernels, call.key, *call.flat())

    return Call("rope", BACKENDS, backend, check, record, run)


class RopeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, key, *values):
        call = with_key(RopeCall(*values), key)
        ctx.save_for_backward(call.cos, call.sin)
        ctx.kernels, ctx.options = kernels, (call.rotated, call.interleaved, not call.transposed)
        return kernels.rope_fwd(call)

    @staticmethod
    def backward(ctx, dq, dk):
        # A gradient expanded from one number has no contiguous dimension.
        dq, dk = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (dq, dk))
        grads = apply(RopeFunction, ctx.kernels, None, dq, dk, *ctx.saved_tensors, *ctx.options)
        return None, None, *grads, None, None, None, None, None


class NormRopeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, key, *values):
        call = with_key(NormRopeCall(*values), key)
        q, k, *rstds = kernels.rope_norm_fwd(call)
        ctx.save_for_backward(*values[:6], *rstds)
        ctx.kernels, ctx.key, ctx.options = kernels, key, values[6:]
        return q, k

    @staticmethod
    def backward(ctx, dq, dk):
        *tensors, q_rstd, k_rstd = ctx.saved_tensors
        call = with_key(NormRopeCall(*tensors, *ctx.options), ctx.key)
        dq, dk = (grad if grad.stride(-1) == 1 else grad.contiguous() for grad in (dq, dk))
        grads = ctx.kernels.rope_norm_bwd(call, dq, dk, q_rstd, k_rstd)
        dq, dk, dq_norm, dk_norm = first_order_only("rope", grads, (dq, dk, *tensors))
        return None, None, dq, dk, None, None, dq_norm, dk_norm, None, None, None, None, None


def check_norms(q: Tensor, q_norm, k_norm, eps, offset, cast) -> None:
    if q_norm is None and k_norm is None:
        return
    if q_norm is None or k_norm is None:
        raise TypeError("q_norm and k_norm must be given both, or neither")
    check_weight(q, q_norm, eps, offset, cast, "q_norm")
    check_weight(q, k_norm, eps, offset, cast, "k_norm")


def check_heads(q: Tensor, k: Tensor) -> None:
    checks.check_tensor("q", q, ndim=4)
    checks.check_tensor("k", k, dtypes=(q.dtype,), ndim=4, device=q.device)
    if q.shape[-1] == 0:
        raise ValueError(f"q must have a head size (last dimension) of at least 1, not shape {tuple(q.shape)}")
    checks.check_shape("k", k, (q.shape[0], k.shape[1], *q.shape[2:]), "batch, tokens and head size as q")


def check_tables(q: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int | None) -> None:
    batch, _, tokens, size = q.shape
    for name, table in (("cos", cos), ("sin", sin)):
        checks.check_tensor(name, table, device=q.device)
        if table.requires_grad:
            raise ValueError(f"{name} must not require a gradient: rope has none for it")
    if cos.shape[:-1] not in ((tokens,), (batch, tokens)):
        raise ValueError(f"cos must have shape ({tokens}, W) or ({batch}, {tokens}, W), not {tuple(cos.shape)}")
    checks.check_tensor("sin", sin, dtypes=(cos.dtype,))
    checks.check_shape("sin", sin, cos.shape, "cos's shape")
    if rotary_dim is not None and (isinstance(rotary_dim, bool) or not isinstance(rotary_dim, int)):
        raise TypeError(f"rotary_dim must be None or an int, not {rotary_dim!r}")
    rotated = cos.shape[-1] if rotary_dim is None else rotary_dim
    if rotated % 2 or not 2 <= rotated <= size:
        what = "cos must have a last dimension that is" if rotary_dim is None else "rotary_dim must be"
        raise ValueError(f"{what} even and 2 ... {size} (q's head size), not {rotated}")
    if cos.shape[-1] not in (rotated, rotated // 2):
        raise ValueError(f"cos must have {rotated} or {rotated // 2} columns (rotary_dim or half), not {cos.shape[-1]}")
