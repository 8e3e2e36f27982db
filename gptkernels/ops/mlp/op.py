"""The MLP of a transformer block: linear, activation, linear, with what backward needs chosen by the caller."""

import torch
from torch import Tensor

from ...dispatch import Call, UnsupportedError, op
from ...records import with_key
from ...torch_library import apply, first_order_only
from .. import checks
from ..autocast import autocast
from ..products import SUM
from ..rows import as_rows, check_rows
from . import cuda_kernels, eager, native, triton_kernels
from .outputs import is_transposed
from .record import MlpCall

BACKENDS = {"cuda": cuda_kernels, "triton": triton_kernels, "eager": eager, "torch": native}
ACTIVATIONS = tuple(eager.FORWARD)
SAVE = ("all", "preact", "input")


@op(native=native.native_mlp)
def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    residual: Tensor | None = None,
    save: str = "preact",
    backend: str = "auto",
) -> Call[Tensor]:
    """activation(x @ fc_weight.T + fc_bias) @ proj_weight.T + proj_bias (+ residual)

    x: (..., d), fc_weight: (hidden, d), fc_bias: (hidden,), proj_weight: (d_out, hidden), proj_bias: (d_out,),
    residual: (..., d_out) -> (..., d_out). Biases may be None.
    activation: gelu_tanh (GPT-2's), gelu (exact), relu, relu2 (squared), silu.
    save: what is kept for backward beside x: "all" (the hidden layer before and after the activation), "preact" (only
        before), "input" (neither: the first product is computed again). On a CPU, where making the activation again
        takes longer than it is worth, "preact" is "all", which is what PyTorch's own ops keep.
    float32 products follow torch.get_float32_matmul_precision(). Under autocast everything is cast to its dtype. An x
    whose rows are not evenly spaced, or whose last dimension is not contiguous, is copied once.
    Weights may be views (out, in) of matrices (in, out), and their gradients then are, too. Few rows take them as they
    are; many rows copy them for a fused kernel.
    """
    weights = fc_weight, proj_weight
    x, fc_weight, fc_bias, proj_weight, proj_bias, residual = autocast(
        x, fc_weight, fc_bias, proj_weight, proj_bias, residual
    )

    def check():
        check_tensors(x, fc_weight, fc_bias, proj_weight, proj_bias, residual)
        checks.check_choice("activation", activation, ACTIVATIONS)
        checks.check_choice("save", save, SAVE)

    def record():
        rows = None if residual is None else as_rows(residual)
        fc, proj = (w if is_transposed(w) else w.contiguous() for w in (fc_weight, proj_weight))
        fc_row, proj_row = (None if bias is None else bias.contiguous() for bias in (fc_bias, proj_bias))
        return MlpCall(as_rows(x), fc, fc_row, proj, proj_row, rows, activation, save)

    def run(kernels, call):
        sums = sum_of("fc_weight", weights[0]), sum_of("proj_weight", weights[1])
        if kernels is native and sums == (None, None):
            out = native.run(call)
        else:  # PyTorch's own ops add to no sum
            out = apply(MlpFunction, eager if kernels is native else kernels, call.key, sums, *call.flat())
        return out if x.ndim == 2 else out.view(*x.shape[:-1], proj_weight.shape[0])

    return Call("mlp", BACKENDS, backend, check, record, run)


class MlpFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, key, sums, *values):
        call = with_key(MlpCall(*values), key)
        out, preact, act = kernels.mlp_fwd(call)
        ctx.save_for_backward(call.x, call.fc_weight, call.fc_bias, call.proj_weight, preact, act)
        ctx.kernels, ctx.key, ctx.options, ctx.sums = kernels, key, (call.activation, call.save), sums
        return out

    @staticmethod
    def backward(ctx, dout):
        x, fc_weight, fc_bias, proj_weight, preact, act = ctx.saved_tensors
        call = with_key(MlpCall(x, fc_weight, fc_bias, proj_weight, None, None, *ctx.options), ctx.key)
        dout, needs = as_rows(dout), list(ctx.needs_input_grad[3:8])
        grads = ctx.kernels.mlp_bwd(call, dout, preact, act, needs, *ctx.sums)
        added = (False, ctx.sums[0] is not None, False, ctx.sums[1] is not None, False)
        grads = [g if needed and not has else None for g, needed, has in zip(grads, needs, added, strict=True)]
        grads.append(dout if ctx.needs_input_grad[8] else None)
        sources = dout, x, fc_weight, fc_bias, proj_weight
        return None, None, None, *first_order_only("mlp", tuple(grads), sources), None, None


def accumulate_gradient(weight: Tensor, total: Tensor | None) -> None:
    """From now on gk.mlp and gk.gated_mlp add the gradient of this weight to `total` within the product that makes it,
    without rounding it first, and leave weight.grad alone. total: the weight's shape, float32 or the weight's dtype,
    such as the gradient of earlier micro-batches; None ends it. Not for torch.compile."""
    if total is not None:
        checks.check_tensor(
            "total", total, dtypes=(*dict.fromkeys((weight.dtype, torch.float32)),), device=weight.device
        )
        checks.check_shape("total", total, weight.shape, "the weight's shape")
        if total.requires_grad:
            raise ValueError("total must not require a gradient: it is written to")
    setattr(weight, SUM, total)


def sum_of(name: str, weight: Tensor, op: str = "mlp") -> Tensor | None:
    """What accumulate_gradient asked for."""
    total = getattr(weight, SUM, None)
    if total is not None and torch.compiler.is_compiling():
        raise UnsupportedError(f"{op}: {name} accumulates its gradient, which torch.compile cannot trace")
    return total


def check_tensors(x, fc_weight, fc_bias, proj_weight, proj_bias, residual) -> None:
    check_rows("x", x)
    check_weights(x, {"fc_weight": fc_weight, "proj_weight": proj_weight})
    hidden, out = fc_weight.shape[0], proj_weight.shape[0]
    checks.check_shape("fc_weight", fc_weight, (hidden, x.shape[-1]), "(hidden, x's last dimension)")
    checks.check_shape("proj_weight", proj_weight, (out, hidden), "(out, fc_weight's first dimension)")
    check_biases(x, {"fc_bias": (fc_bias, hidden), "proj_bias": (proj_bias, out)})
    check_residual(x, residual, out)


def check_weights(x: Tensor, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        checks.check_tensor(name, weight, dtypes=(x.dtype,), ndim=2, device=x.device)
        if weight.numel() == 0:
            raise ValueError(f"{name} must not be empty, but has shape {tuple(weight.shape)}")


def check_biases(x: Tensor, biases: dict[str, tuple[Tensor | None, int]]) -> None:
    for name, (bias, size) in biases.items():
        if bias is not None:
            checks.check_tensor(name, bias, dtypes=(x.dtype,), device=x.device)
            checks.check_shape(name, bias, (size,), "the first dimension of its weight")


def check_residual(x: Tensor, residual: Tensor | None, out: int) -> None:
    if residual is not None:
        checks.check_tensor("residual", residual, dtypes=(x.dtype,), device=x.device)
        checks.check_shape("residual", residual, (*x.shape[:-1], out), "the output's shape")
