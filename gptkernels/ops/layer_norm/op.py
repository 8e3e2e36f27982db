"""LayerNorm over the last dimension, alone or with the residual addition (and dropout) before it in the same pass."""

import torch
from torch import Tensor

from ...dispatch import Call, op
from ...records import with_key
from ...torch_library import apply, first_order_only
from .. import checks
from ..dropout import draw_seed
from ..rows import as_rows, check_rows, shaped
from . import cuda_kernels, eager, native, triton_kernels
from .record import LayerNormCall

BACKENDS = {"cuda": cuda_kernels, "triton": triton_kernels, "eager": eager, "torch": native}


@op(native=native.native_layer_norm)
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5, backend: str = "auto"
) -> Call[Tensor]:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension, statistics in float32.

    x: (..., N), weight, bias: (N,) -> (..., N) in x's dtype, contiguous.
    Parameters have x's dtype or float32. Rows may have any stride; an x whose rows are not evenly spaced, or whose
    last dimension is not contiguous, is copied once.
    """

    def check():
        check_rows("x", x)
        check_parameters(x, weight, bias, eps)

    def record():
        parameters = weight.contiguous(), None if bias is None else bias.contiguous()
        return LayerNormCall(as_rows(x), None, *parameters, None, float(eps), 0.0)

    def run(kernels, call):
        if kernels is native:
            return shaped(native.run(call), x)
        return shaped(apply(LayerNormFunction, kernels, call.key, call.x, call.weight, call.bias, call.eps), x)

    return Call("layer_norm", BACKENDS, backend, check, record, run)


@op(native=native.native_add_layer_norm)
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Call[tuple[Tensor, Tensor]]:
    """-> (layer_norm(h), h) with h = dropout(x) + residual, in one pass; backward folds both gradients of h into one.

    x, residual: (..., N), weight, bias: (N,). The normalised output has x's dtype, h has residual's: x's or float32
    (a float32 residual stream under bfloat16 layers). dropout is applied whenever it is > 0: pass 0.0 in evaluation.
    """

    def check():
        check_rows("x", x)
        checks.check_tensor("residual", residual, dtypes=(*dict.fromkeys((x.dtype, torch.float32)),), device=x.device)
        checks.check_shape("residual", residual, x.shape, "x's shape")
        check_parameters(x, weight, bias, eps)
        checks.check_number("dropout", dropout, at_least=0, below=1)

    def record():
        parameters = weight.contiguous(), None if bias is None else bias.contiguous()
        return LayerNormCall(as_rows(x), as_rows(residual), *parameters, None, float(eps), float(dropout))

    def run(kernels, call):
        y, h = native.run(call) if kernels is native else apply(AddLayerNormFunction, kernels, call.key, *call.flat())
        return shaped(y, x), shaped(h, x)

    return Call("add_layer_norm", BACKENDS, backend, check, record, run)


def check_parameters(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    checks.check_tensor("weight", weight, dtypes=(*dict.fromkeys((x.dtype, torch.float32)),), device=x.device)
    checks.check_shape("weight", weight, x.shape[-1:], "x's last dimension")
    if bias is not None:
        checks.check_tensor("bias", bias, dtypes=(weight.dtype,), device=x.device)
        checks.check_shape("bias", bias, x.shape[-1:], "x's last dimension")
    checks.check_number("eps", eps, above=0)


class LayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, key, x, weight, bias, eps):
        y, _, mean, rstd = kernels.layer_norm_fwd(with_key(LayerNormCall(x, None, weight, bias, None, eps, 0.0), key))
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.kernels, ctx.key, ctx.eps = kernels, key, eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        call = with_key(LayerNormCall(x, None, weight, None, None, ctx.eps, 0.0), ctx.key)
        needs = ctx.needs_input_grad[3:5]
        grad_x, _, *others = ctx.kernels.layer_norm_bwd(call, as_rows(dy), None, mean, rstd, *needs)
        grads = grad_x, *(grad if needed else None for grad, needed in zip(others, needs, strict=True))
        return None, None, *first_order_only("layer_norm", grads, (dy, x, weight)), None


class AddLayerNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, key, *values):
        call = with_key(LayerNormCall(*values), key)
        if call.dropout:
            call.seed = draw_seed(call.x.device)
        y, h, mean, rstd = kernels.layer_norm_fwd(call)
        ctx.save_for_backward(h, call.weight, call.seed, mean, rstd)
        ctx.kernels, ctx.key, ctx.dtype, ctx.options = kernels, key, call.x.dtype, values[5:]
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx, dy, dh):
        h, weight, seed, mean, rstd = ctx.saved_tensors
        call = with_key(LayerNormCall(h, None, weight, None, seed, *ctx.options), ctx.key)
        needs = ctx.needs_input_grad[4:6]
        dy = torch.zeros_like(h, dtype=ctx.dtype) if dy is None else as_rows(dy)
        dh = None if dh is None else as_rows(dh)
        grad_h, grad_x, *others = ctx.kernels.layer_norm_bwd(call, dy, dh, mean, rstd, *needs)
        grads = grad_h if grad_x is None or grad_x.ndim != h.ndim else grad_x, grad_h
        grads += tuple(grad if needed else None for grad, needed in zip(others, needs, strict=True))
        return None, None, *first_order_only("add_layer_norm", grads, (dy, dh, h, weight)), None, None, None
