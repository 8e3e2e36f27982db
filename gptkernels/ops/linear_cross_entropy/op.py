"""The loss of a language model straight from the hidden states: cross-entropy of x @ weight.T, without its logits."""

from typing import Any

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
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    class_weight: Tensor | None = None,
    return_z_loss: bool = False,
    backend: str = "auto",
) -> Call[Any]:
    """F.cross_entropy(x @ weight.T + bias, targets) in float32, a few rows of logits at a time.

    x: (..., d), weight: (V, d), targets: (...) int64 -> () or, with reduction="none", (...), float32.
    bias: (V,), in x's dtype or float32; added in float32.
    softcap, temperature: the logits become softcap * tanh(logits / softcap), as Gemma 2's do, and are divided by the
        temperature.
    class_weight, label_smoothing: as F.cross_entropy's; a "mean" is over the targets' weights. class_weight: (V,)
        without a gradient, taken in float32.
    z_loss: adds z_loss * logsumexp(logits)^2 of each row that is not ignored, whose "mean" is over those rows. With
        return_z_loss the result is (loss, what that added), the second without a gradient.

    With "mean" and "sum" the gradients are made in the forward pass; "none" computes the logits again in backward. The
    weight's gradient is summed up in float32. Under autocast x and weight are cast to its dtype; a float32 weight then
    gets the float32 sum as its gradient, never rounded.
    Targets are checked to be in 0 ... V - 1 (or ignore_index) on the CPU, and on a GPU if GPTKERNELS_CHECKED=1 is set
    (it waits for the GPU); unchecked, a target out of range gives a loss of NaN.
    """

    def check():
        check_tensors(x, weight, targets, bias)
        if class_weight is not None:
            check_vector("class_weight", class_weight, weight, checks.DTYPES)
            if class_weight.requires_grad:
                raise ValueError("class_weight must not require a gradient: it gets none")
        checks.check_choice("reduction", reduction, REDUCTIONS)
        check_ignore_index(ignore_index)
        checks.check_number("label_smoothing", label_smoothing, at_least=0, at_most=1)
        checks.check_number("z_loss", z_loss, at_least=0, below=float("inf"))
        checks.check_positive("softcap", softcap)
        checks.check_number("temperature", temperature, above=0, below=float("inf"))
        checks.check_flags(return_z_loss=return_z_loss)

    def record():
        weights = None if class_weight is None else class_weight.detach().float().contiguous()
        dtype = autocast_dtype(x.device) or x.dtype
        smoothing, of_squares, cap = float(label_smoothing), float(z_loss), float(softcap or 0)
        rows = in_rows(x, weight, targets, bias)
        return LossCall(*rows, weights, ignore_index, reduction, dtype, smoothing, of_squares, cap, float(temperature))

    def run(kernels, call):
        loss, z = apply(LinearCrossEntropyFunction, kernels, call.key, *call.flat())
        if reduction == "none":
            loss, z = loss.view(targets.shape), z.view(targets.shape) if z_loss else z
        return (loss, z if z_loss else torch.zeros_like(loss)) if return_z_loss else loss

    return Call("linear_cross_entropy", BACKENDS, backend, check, record, run)


@op()
def linear_log_probs(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    backend: str = "auto",
) -> Call[Tensor]:
    """log_softmax((x @ weight.T + bias) / temperature) of the targets, a few rows of logits at a time: what the losses
    of reinforcement learning (PPO, GRPO, DPO) are made of.

    x: (..., d), weight: (V, d), bias: (V,), targets: (...) int64 -> (...) float32. The logits are computed again in
    backward. A target of -100 gives 0, and no gradient; the others are checked, and autocast works, as with
    linear_cross_entropy.
    """

    def check():
        check_tensors(x, weight, targets, bias)
        checks.check_number("temperature", temperature, above=0, below=float("inf"))

    def record():
        dtype = autocast_dtype(x.device) or x.dtype
        rows = in_rows(x, weight, targets, bias)
        return LossCall(*rows, reduction="none", dtype=dtype, temperature=float(temperature))

    def run(kernels, call):
        losses, _ = apply(LinearCrossEntropyFunction, kernels, call.key, *call.flat())
        return -losses.view(targets.shape)

    return Call("linear_log_probs", BACKENDS, backend, check, record, run)


class LinearCrossEntropyFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, key, x, weight, targets, bias, *options):
        call = computed(key, x, weight, targets, bias, *options)
        needs = wanted(ctx)
        # In float32 until backward has scaled it: rounding it before and after would be twice the error.
        loss, z, lse, grad_x, *grads = kernels.linear_cross_entropy_fwd(call, *needs)
        later = (lse,) if call.reduction == "none" else (grad_x.to(x.dtype), *grads)
        ctx.class_weight, *ctx.options = options
        ctx.save_for_backward(x, weight, targets, bias, *later)
        ctx.kernels, ctx.key = kernels, key
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    def backward(ctx, dloss, _):
        x, weight, targets, bias, *later = ctx.saved_tensors
        needs = wanted(ctx)
        call = computed(ctx.key, x, weight, targets, bias, ctx.class_weight, *ctx.options)
        if call.reduction == "none":
            dloss, (lse,) = dloss.contiguous(), later
            grad_x, *grads = ctx.kernels.linear_cross_entropy_bwd(
                call, dloss, lse, *needs, weight.dtype == torch.float32
            )
            found = [grad_x.to(x.dtype), *grads]
        else:
            found = later if is_one(dloss) else [grad * dloss for grad in later]
        sources = x, weight, bias
        grad_x, grad_weight, grad_bias = first_order_only(
            "linear_cross_entropy",
            tuple(
                grad.to(source.dtype) if needed else None
                for grad, source, needed in zip(found, sources, needs, strict=True)
            ),
            (dloss, *sources),
        )
        return None, None, grad_x, grad_weight, None, grad_bias, *[None] * 8


def wanted(ctx) -> tuple[bool, bool, bool]:
    """Whether the gradients of x, weight and bias are asked for"""
    return ctx.needs_input_grad[2], ctx.needs_input_grad[3], ctx.needs_input_grad[5]


def in_rows(x, weight, targets, bias) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return as_rows(x), weight.contiguous(), targets.reshape(-1).contiguous(), bias


def computed(key, x, weight, targets, bias, class_weight, *options) -> LossCall:
    """As the kernels get it"""
    bias = None if bias is None else bias.float().contiguous()
    call = with_key(LossCall(x, weight, targets, bias, class_weight, *options), key)
    call.x, call.weight = x.to(call.dtype), weight.to(call.dtype)
    return call


def is_one(dloss: Tensor) -> bool:
    """Whether the gradient of the loss is known to be 1, without waiting for a GPU."""
    return not torch.compiler.is_compiling() and type(dloss) is Tensor and dloss.is_cpu and dloss.item() == 1


def check_tensors(x, weight, targets, bias) -> None:
    check_rows("x", x)
    same = checks.DTYPES if autocast_dtype(x.device) else (x.dtype,)
    checks.check_tensor("weight", weight, dtypes=same, ndim=2, device=x.device)
    if weight.numel() == 0:
        raise ValueError(f"weight must not be empty, but has shape {tuple(weight.shape)}")
    checks.check_shape("weight", weight, (weight.shape[0], x.shape[-1]), "(vocabulary, x's last dimension)")
    checks.check_tensor("targets", targets, dtypes=(torch.int64,), device=x.device)
    checks.check_shape("targets", targets, x.shape[:-1], "x's shape without the last dimension")
    if bias is not None:
        check_vector("bias", bias, weight, tuple({*same, torch.float32}))


def check_vector(name: str, value, weight: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """value: (V,), weight: (V, d)"""
    checks.check_tensor(name, value, dtypes=dtypes, ndim=1, device=weight.device)
    checks.check_shape(name, value, weight.shape[:1], "weight's vocabulary")


def check_ignore_index(ignore_index) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int, not {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit targets' int64, not {ignore_index}")
