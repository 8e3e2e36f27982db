"""Distillation straight from hidden states: how far a student's next tokens are from a teacher's, without logits."""

import torch
from torch import Tensor

from ...dispatch import Call, op
from ...records import with_key
from ...torch_library import apply, first_order_only
from .. import checks
from ..autocast import autocast_dtype
from ..linear_cross_entropy.op import REDUCTIONS, check_ignore_index, is_one
from ..rows import as_rows, check_rows
from . import eager, triton_kernels
from .record import DistillCall

BACKENDS = {"triton": triton_kernels, "eager": eager}


@op()
def linear_kl_div(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    targets: Tensor | None = None,
    *,
    vocabulary: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    temperature: float = 1.0,
    backend: str = "auto",
) -> Call[Tensor]:
    """KL(teacher || student) of softmax(teacher_x @ teacher_weight.T / temperature) and of
    softmax(x @ weight.T / temperature) in float32, a few rows of both logits at a time.

    x: (..., d), weight: (V, d), teacher_x: (..., e), teacher_weight: (W, e) -> () or, with reduction="none", (...),
    float32. Teacher and student may differ in width and dtype. The teacher gets no gradient.
    targets: (...) int64; rows of which this is ignore_index do not count, what else it is does not matter.
    vocabulary: the tokens of both, by default the smaller of V and W; rows of the weights beyond are padding, which no
    softmax sees.

    The gradient is that of what is returned: a loss beside cross-entropy takes it times temperature^2 (Hinton et al.
    2015), so that it weighs the same at every temperature. With "mean" and "sum" gradients are made in the forward
    pass; "none" computes the logits again in backward. The weight's gradient is summed up in float32, and under
    autocast all products are in its dtype.
    """

    def check():
        check_side("", x, weight)
        check_side("teacher_", teacher_x, teacher_weight)
        checks.check_tensor("teacher_x", teacher_x, device=x.device)
        checks.check_shape("teacher_x", teacher_x, (*x.shape[:-1], teacher_x.shape[-1]), "x's rows")
        for name, tensor in (("teacher_x", teacher_x), ("teacher_weight", teacher_weight)):
            if tensor.requires_grad:
                raise ValueError(f"{name} must not require a gradient: it gets none (detach() it)")
        if targets is not None:
            checks.check_tensor("targets", targets, dtypes=(torch.int64,), device=x.device)
            checks.check_shape("targets", targets, x.shape[:-1], "x's shape without the last dimension")
        check_vocabulary(vocabulary, weight, teacher_weight)
        checks.check_choice("reduction", reduction, REDUCTIONS)
        check_ignore_index(ignore_index)
        checks.check_number("temperature", temperature, above=0, below=float("inf"))

    def record():
        rows = None if targets is None else targets.reshape(-1).contiguous()
        tokens = vocabulary or min(weight.shape[0], teacher_weight.shape[0])
        cast = autocast_dtype(x.device)
        return DistillCall(
            as_rows(x),
            weight.contiguous(),
            as_rows(teacher_x),
            teacher_weight.contiguous(),
            rows,
            ignore_index,
            reduction,
            float(temperature),
            tokens,
            cast or x.dtype,
            cast or teacher_x.dtype,
        )

    def run(kernels, call):
        loss = apply(LinearKLDivFunction, kernels, call.key, *call.flat())
        return loss.view(x.shape[:-1]) if reduction == "none" else loss

    return Call("linear_kl_div", BACKENDS, backend, check, record, run)


class LinearKLDivFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, key, x, weight, teacher_x, teacher_weight, targets, *options):
        call = computed(key, x, weight, teacher_x, teacher_weight, targets, *options)
        loss, grad_x, grad_weight = kernels.linear_kl_div_fwd(call, *ctx.needs_input_grad[2:4])
        # Rounded once, when backward has scaled them.
        later = (teacher_x, teacher_weight, targets) if call.reduction == "none" else (grad_x, grad_weight)
        ctx.save_for_backward(x, weight, *later)
        ctx.kernels, ctx.key, ctx.options = kernels, key, options
        return loss

    @staticmethod
    def backward(ctx, dloss):
        x, weight, *later = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:4]
        if len(later) == 3:
            call = computed(ctx.key, x, weight, *later, *ctx.options)
            float_weight = weight.dtype == torch.float32
            found = ctx.kernels.linear_kl_div_bwd(call, dloss.contiguous(), *needs, float_weight)
        else:
            found = later if is_one(dloss) else [grad * dloss for grad in later]
        grads = first_order_only(
            "linear_kl_div",
            tuple(
                grad.to(source.dtype) if needed else None
                for grad, source, needed in zip(found, (x, weight), needs, strict=True)
            ),
            (dloss, x, weight),
        )
        return None, None, *grads, *[None] * 9


def computed(key, x, weight, teacher_x, teacher_weight, *rest) -> DistillCall:
    """As the kernels get it"""
    call = with_key(DistillCall(x, weight, teacher_x, teacher_weight, *rest), key)
    call.x, call.weight = x.to(call.dtype), weight.to(call.dtype)
    call.teacher_x, call.teacher_weight = (each.to(call.teacher_dtype) for each in (teacher_x, teacher_weight))
    return call


def check_side(prefix: str, x, weight) -> None:
    """Of the student ("") or the teacher ("teacher_")"""
    name = f"{prefix}weight"
    check_rows(f"{prefix}x", x)
    dtypes = checks.DTYPES if autocast_dtype(x.device) else (x.dtype,)
    checks.check_tensor(name, weight, dtypes=dtypes, ndim=2, device=x.device)
    if weight.numel() == 0:
        raise ValueError(f"{name} must not be empty, but has shape {tuple(weight.shape)}")
    checks.check_shape(name, weight, (weight.shape[0], x.shape[-1]), f"(vocabulary, {prefix}x's last dimension)")


def check_vocabulary(vocabulary, weight: Tensor, teacher_weight: Tensor) -> None:
    if vocabulary is None:
        return
    if isinstance(vocabulary, bool) or not isinstance(vocabulary, int):
        raise TypeError(f"vocabulary must be an int or None, not {type(vocabulary).__name__}")
    most = min(weight.shape[0], teacher_weight.shape[0])
    if not 1 <= vocabulary <= most:
        raise ValueError(f"vocabulary must be 1 ... {most} (rows of both weights), not {vocabulary}")
