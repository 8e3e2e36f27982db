"""The loss of a language model straight from the hidden states: cross-entropy of x @ weight.T, without its logits."""

import torch
from torch import Tensor

from ...dispatch import Call, op
from ...records import with_key
from ...torch_library import apply, first_order_only
from .. import checks
from ..autocast import autocast_dtype
from ..rows import as_rows, check_rows
from . import cuda_kernels, eager, triton_kernels
from .record import LossCall

BACKENDS = {"cuda": cuda_kernels, "triton": triton_kernels, "eager": eager}
REDUCTIONS = ("mean", "sum", "none")


@op()
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    backend: str = "auto",
) -> Call[Tensor]:
    """F.cross_entropy(x @ weight.T, targets) in float32, a few rows of logits at a time.

    x: (..., d), weight: (V, d), targets: (...) int64 -> () or, with reduction="none", (...), float32.
    With "mean" and "sum" the gradients are made in the forward pass; "none" computes the logits again in backward. The
    weight's gradient is summed up in float32. Under autocast x and weight are cast to its dtype; a float32 weight then
    gets the float32 sum as its gradient, never rounded.
    Targets are checked to be in 0 ... V - 1 (or ignore_index) on the CPU, and on a GPU if GPTKERNELS_CHECKED=1 is set
    (it waits for the GPU); unchecked, a target out of range gives a loss of NaN.
    """

    def check():
        check_tensors(x, weight, targets)
        checks.check_choice("reduction", reduction, REDUCTIONS)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index must be an int, not {type(ignore_index).__name__}")
        if not -(2**63) <= ignore_index < 2**63:
            raise ValueError(f"ignore_index must fit targets' int64, not {ignore_index}")

    def record():
        operands = as_rows(x), weight.contiguous(), targets.reshape(-1).contiguous()
        return LossCall(*operands, ignore_index, reduction, autocast_dtype(x.device) or x.dtype)

    def run(kernels, call):
        loss = apply(LinearCrossEntropyFunction, kernels, call.key, *call.flat())
        return loss.view(targets.shape) if reduction == "none" else loss

    return Call("linear_cross_entropy", BACKENDS, backend, check, record, run)


class LinearCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, key, x, weight, targets, *options):
        call = computed(key, x, weight, targets, *options)
        needs = ctx.needs_input_grad[2:4]
        # In float32 until backward has scaled it: rounding it before and after would be twice the error.
        loss, lse, grad_x, grad_weight = kernels.linear_cross_entropy_fwd(call, *needs)
        later = (lse,) if call.reduction == "none" else (grad_x.to(x.dtype), grad_weight)
        ctx.save_for_backward(x, weight, targets, *later)
        ctx.kernels, ctx.key, ctx.options = kernels, key, options
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, weight, targets, *later = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:4]
        call = computed(ctx.key, x, weight, targets, *ctx.options)
        if call.reduction == "none":
            dloss, (lse,) = dloss.contiguous(), later
            grad_x, grad_weight = ctx.kernels.linear_cross_entropy_bwd(
                call, dloss, lse, *needs, weight.dtype == torch.float32
            )
            found = grad_x.to(x.dtype), grad_weight
        else:
            scaled = later if is_one(dloss) else [grad * dloss for grad in later]
            found = tuple(grad.to(source.dtype) for grad, source in zip(scaled, (x, weight), strict=True))
        grads = tuple(grad if needed else None for grad, needed in zip(found, needs, strict=True))
        return None, None, *first_order_only("linear_cross_entropy", grads, (dloss, x, weight)), None, None, None, None


def computed(key, x, weight, targets, ignore_index, reduction, dtype) -> LossCall:
    """As the kernels get it"""
    return with_key(LossCall(x.to(dtype), weight.to(dtype), targets, ignore_index, reduction, dtype), key)


def is_one(dloss: Tensor) -> bool:
    """Whether the gradient of the loss is known to be 1, without waiting for a GPU."""
    return not torch.compiler.is_compiling() and type(dloss) is Tensor and dloss.is_cpu and dloss.item() == 1


def check_tensors(x, weight, targets) -> None:
    check_rows("x", x)
    same = checks.DTYPES if autocast_dtype(x.device) else (x.dtype,)
    checks.check_tensor("weight", weight, dtypes=same, ndim=2, device=x.device)
    if weight.numel() == 0:
        raise ValueError(f"weight must not be empty, but has shape {tuple(weight.shape)}")
    checks.check_shape("weight", weight, (weight.shape[0], x.shape[-1]), "(vocabulary, x's last dimension)")
    checks.check_tensor("targets", targets, dtypes=(torch.int64,), device=x.device)
    checks.check_shape("targets", targets, x.shape[:-1], "x's shape without the last dimension")
