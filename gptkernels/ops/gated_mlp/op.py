"""The gated MLP of a transformer block: two linear layers beside each other, one of them through an activation, their
product, and a third linear layer, with what backward needs chosen by the caller."""

from typing import Any, cast

import torch
from torch import Tensor

from ...dispatch import Call, op
from ...records import with_key
from ...torch_library import apply, first_order_only
from .. import checks
from ..autocast import autocast
from ..mlp.op import SAVE, check_biases, check_residual, check_weights, sum_of
from ..rows import as_rows, check_rows, contiguous_rows
from . import cuda_kernels, eager, native, triton_kernels
from .record import GatedMlpCall
from .reference import ACTIVATIONS as FORMULAS

BACKENDS = {"cuda": cuda_kernels, "triton": triton_kernels, "eager": eager, "torch": native}
ACTIVATIONS = tuple(FORMULAS)


@op(native=native.native_gated_mlp)
def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    residual: Tensor | None = None,
    save: str = "preact",
    backend: str = "auto",
) -> Call[Tensor]:
    """(activation(gate) * up) @ down_weight.T + down_bias (+ residual); gate = x @ gate_weight.T + gate_bias, and so up

    x: (..., d), gate_weight, up_weight: (hidden, d), down_weight: (d_out, hidden), gate_bias, up_bias: (hidden,),
    down_bias: (d_out,), residual: (..., d_out) -> (..., d_out).
    activation: silu (Llama's), gelu_tanh (Gemma's), gelu, relu, relu2, or gpt_oss, which is gpt-oss's own product:
        (clamp(up, -7, 7) + 1) * g * sigmoid(1.702 g), g = min(gate, 7).
    save: what is kept for backward beside x, of the tensors (..., hidden): "all" gate, up and their product (6 bytes in
        16 bits), "preact" gate and up (4 bytes), "input" none (the first two products are computed again). On a CPU
        "preact" and "all" are PyTorch's own ops, which keep 8 bytes.
    gate_weight and up_weight may be views of one packed matrix, its halves or every other row of it. What is copied is
    a weight whose last dimension is not contiguous, a down_weight that is part of a wider matrix, and an x whose rows
    are not evenly spaced, or whose last dimension is not contiguous.
    float32 products follow torch.get_float32_matmul_precision(). Under autocast everything is cast to its dtype.
    """
    weights = gate_weight, up_weight, down_weight
    x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, residual = autocast(
        x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, residual
    )

    def check():
        check_tensors(x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, residual)
        checks.check_choice("activation", activation, ACTIVATIONS)
        checks.check_choice("save", save, SAVE)

    def record():
        rows = None if residual is None else as_rows(residual)
        biases = (None if bias is None else bias.contiguous() for bias in (gate_bias, up_bias, down_bias))
        gate_row, up_row, down_row = biases
        first = contiguous_rows(gate_weight), contiguous_rows(up_weight), gate_row, up_row
        return GatedMlpCall(as_rows(x), *first, down_weight.contiguous(), down_row, rows, activation, save)

    def run(kernels, call):
        names = "gate_weight", "up_weight", "down_weight"
        sums = tuple(sum_of(name, weight, "gated_mlp") for name, weight in zip(names, weights, strict=True))
        if kernels is native and sums == (None, None, None):
            out = native.run(call)
        else:  # PyTorch's own ops add to no sum
            out = apply(GatedMlpFunction, eager if kernels is native else kernels, call.key, sums, *call.flat())
        return out if x.ndim == 2 else out.view(*x.shape[:-1], down_weight.shape[0])

    return Call("gated_mlp", BACKENDS, backend, check, record, run)


class GatedMlpFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, key, sums, *values):
        call = with_key(GatedMlpCall(*values), key)
        out, *kept = kernels.gated_mlp_fwd(call)
        ctx.save_for_backward(*values[:6], *kept)
        ctx.kernels, ctx.key, ctx.options, ctx.sums = kernels, key, (call.activation, call.save), sums
        return out

    @staticmethod
    def backward(ctx, dout):
        *values, gate, up, hidden = ctx.saved_tensors
        call = with_key(GatedMlpCall(*cast(Any, (*values, None, None, *ctx.options))), ctx.key)
        dout, needs = as_rows(dout), list(ctx.needs_input_grad[3:10])
        grads = ctx.kernels.gated_mlp_bwd(call, dout, gate, up, hidden, needs, *ctx.sums)
        added = (None, *ctx.sums[:2], None, None, ctx.sums[2], None)
        grads = [g if needed and has is None else None for g, needed, has in zip(grads, needs, added, strict=True)]
        grads.append(dout if ctx.needs_input_grad[10] else None)
        return None, None, None, *first_order_only("gated_mlp", tuple(grads), (dout, *values)), None, None


def check_tensors(x, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias, residual) -> None:
    check_rows("x", x)
    check_weights(x, {"gate_weight": gate_weight, "up_weight": up_weight, "down_weight": down_weight})
    hidden, out = gate_weight.shape[0], down_weight.shape[0]
    checks.check_shape("gate_weight", gate_weight, (hidden, x.shape[-1]), "(hidden, x's last dimension)")
    checks.check_shape("up_weight", up_weight, gate_weight.shape, "gate_weight's shape")
    checks.check_shape("down_weight", down_weight, (out, hidden), "(out, gate_weight's first dimension)")
    check_biases(x, {"gate_bias": (gate_bias, hidden), "up_bias": (up_bias, hidden), "down_bias": (down_bias, out)})
    check_residual(x, residual, out)
