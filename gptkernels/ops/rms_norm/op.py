"""RMSNorm over the last dimension, alone or with the residual addition (and dropout) before it in the same pass."""

import math

import torch
from torch import Tensor

from ...dispatch import Call, op
from ...records import with_key
from ...torch_library import apply, first_order_only
from .. import checks
from ..dropout import draw_seed
from ..rows import as_row_groups, as_rows, check_rows, contiguous_rows, shaped, shaped_in_order
from . import cuda_kernels, eager, native, triton_kernels
from .native import CASTS
from .record import RMSNormCall

BACKENDS = {"cuda": cuda_kernels, "triton": triton_kernels, "eager": eager, "torch": native}


@op(native=native.native_rms_norm)
def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast: str = "llama",
    backend: str = "auto",
) -> Call[Tensor]:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension, computed in float32.

    x: (..., N), weight: (N,) or None -> (..., N) in x's dtype and memory order.
    cast says where the row is rounded to x's dtype: "llama" before the product with the weight and after it, "gemma"
    and "gpt_oss" only after it; Gemma's weights are meant with offset=1.0. The weight has x's dtype or float32; the
    result has x's dtype in either case (Llama's module, given a float32 weight for a bfloat16 x, returns float32).
    Heads of packed projections, (B, T, H, N) in memory and seen as (B, H, T, N), need no copy; an x whose rows lie
    further from evenly than that, or whose last dimension is not contiguous, is copied once.
    """

    def check():
        check_rows("x", x)
        check_weight(x, weight, eps, offset, cast)

    def record():
        dense = None if weight is None else weight.contiguous()
        return RMSNormCall(as_row_groups(x), None, dense, None, float(eps), float(offset), CASTS[cast], 0.0)

    def run(kernels, call):
        if kernels is native:
            return shaped_in_order(native.run(call), x)
        options = call.eps, call.offset, call.cast_first
        return shaped_in_order(apply(RMSNormFunction, kernels, call.key, call.x, call.weight, *options), x)

    return Call("rms_norm", BACKENDS, backend, check, record, run)


@op()
def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast: str = "llama",
    dropout: float = 0.0,
    backend: str = "auto",
) -> Call[tuple[Tensor, Tensor]]:
    """-> (rms_norm(h), h) with h = dropout(x) + residual, in one pass; backward folds both gradients of h into one.

    x, residual: (..., N), weight: (N,) or None. The normalised output has x's dtype, h has residual's: x's or float32
    (a float32 residual stream under bfloat16 layers). dropout is applied whenever it is > 0: pass 0.0 in evaluation.
    """

    def check():
        check_rows("x", x)
        checks.check_tensor("residual", residual, dtypes=(*dict.fromkeys((x.dtype, torch.float32)),), device=x.device)
        checks.check_shape("residual", residual, x.shape, "x's shape")
        check_weight(x, weight, eps, offset, cast)
        checks.check_number("dropout", dropout, at_least=0, below=1)

    def record():
        options = float(eps), float(offset), CASTS[cast], float(dropout)
        dense = None if weight is None else weight.contiguous()
        return RMSNormCall(as_rows(x), as_rows(residual), dense, None, *options)

    def run(kernels, call):
        y, h = native.run(call) if kernels is native else apply(AddRMSNormFunction, kernels, call.key, *call.flat())
        return shaped(y, x), shaped(h, x)

    return Call("add_rms_norm", BACKENDS, backend, check, record, run)


def check_weight(x: Tensor, weight: Tensor | None, eps, offset, cast, name: str = "weight") -> None:
    checks.check_number("offset", offset, above=-math.inf)
    if weight is not None:
        checks.check_tensor(name, weight, dtypes=(*dict.fromkeys((x.dtype, torch.float32)),), device=x.device)
        checks.check_shape(name, weight, x.shape[-1:], "x's last dimension")
    elif offset:
        raise ValueError(f"offset must be 0 without a weight, not {offset}")
    checks.check_number("eps", eps, above=0)
    checks.check_choice("cast", cast, tuple(CASTS))


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, key, x, weight, eps, offset, cast_first):
        call = with_key(RMSNormCall(x, None, weight, None, eps, offset, cast_first, 0.0), key)
        y, _, rstd = kernels.rms_norm_fwd(call)
        ctx.save_for_backward(x, weight, rstd)
        ctx.kernels, ctx.key, ctx.options = kernels, key, (eps, offset, cast_first, 0.0)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, rstd = ctx.saved_tensors
        call = with_key(RMSNormCall(x, None, weight, None, *ctx.options), ctx.key)
        wanted = ctx.needs_input_grad[3]
        grad_x, _, grad_weight = ctx.kernels.rms_norm_bwd(call, contiguous_rows(dy), None, rstd, wanted)
        grads = grad_x, grad_weight if wanted else None
        return None, None, *first_order_only("rms_norm", grads, (dy, x, weight)), None, None, None


class AddRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, key, *values):
        call = with_key(RMSNormCall(*values), key)
        if call.dropout:
            call.seed = draw_seed(call.x.device)
        y, h, rstd = kernels.rms_norm_fwd(call)
        ctx.save_for_backward(h, call.weight, call.seed, rstd)
        ctx.kernels, ctx.key, ctx.dtype, ctx.options = kernels, key, call.x.dtype, values[4:]
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx, dy, dh):
        h, weight, seed, rstd = ctx.saved_tensors
        call = with_key(RMSNormCall(h, None, weight, seed, *ctx.options), ctx.key)
        wanted = ctx.needs_input_grad[4]
        dy = torch.zeros_like(h, dtype=ctx.dtype) if dy is None else as_rows(dy)
        dh = None if dh is None else as_rows(dh)
        grad_h, grad_x, grad_weight = ctx.kernels.rms_norm_bwd(call, dy, dh, rstd, wanted)
        grad_x = grad_h if grad_x is None or grad_x.ndim != h.ndim else grad_x
        grads = grad_x, grad_h, grad_weight if wanted else None
        return None, None, *first_order_only("add_rms_norm", grads, (dy, dh, h, weight)), None, None, None, None, None
