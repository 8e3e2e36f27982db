"""The gated MLP with Triton, on the MLP's kernels: products with fused epilogues, or cuBLAS and one fused pointwise
pass, whichever is faster."""

import torch
from torch import Tensor

from ...remembered import remembered
from ...torch_library import torch_op
from ..mlp.eager import column_sum, weight_grad
from ..mlp.triton_kernels import (
    Product,
    fusing_is_faster,
    grad_preact_launch,
    linear_and_residual,
    linear_launch,
    or_any,
    pointwise_activation,
    pointwise_grad_preact,
    precision,
    told,
    unsupported,
)
from ..rows import zero_
from .eager import first_layer_grads, gate_and_up
from .outputs import Forward, Gradients, bwd_outputs, fwd_outputs, hidden_layer
from .record import GatedMlpCall

__all__ = ["describe", "gated_mlp_bwd", "gated_mlp_fwd", "unsupported"]


def describe(call: GatedMlpCall) -> str:
    return told(fusing_is_faster(call))


@torch_op(fake=fwd_outputs)
def gated_mlp_fwd(call: GatedMlpCall) -> Forward:
    """-> out: (M, d_out), gate, up, hidden: (M, hidden)"""
    if call.x.shape[0] == 0:
        return fwd_outputs(call)
    products = fwd_products(call, precision(call.x.dtype))
    if products:
        first, down = products
        out, gate, up, kept = fwd_outputs(call)
        hidden = hidden_layer(call) if kept is None else kept
        run_first(first, call, gate, up, hidden)
        bias, residual = or_any(call.down_bias, out), or_any(call.residual, out)
        down(hidden, call.down_weight, None, bias, None, residual, out, None, out)
        return out, gate, up, kept
    gate, up = gate_and_up(call, None, None)
    # Where gate is not kept, what becomes of it takes its place.
    hidden = gate if call.save == "input" else torch.empty_like(gate)
    pointwise_activation(gate, up, call.activation, hidden)
    out = linear_and_residual(hidden, call.down_weight, call.down_bias, call.residual)
    if call.save == "input":
        return out, None, None, None
    return out, gate, up, hidden if call.save == "all" else None


def run_first(product: Product, call: GatedMlpCall, gate: Tensor | None, up: Tensor | None, hidden: Tensor) -> None:
    """gate and up, where they are given, and hidden: (M, hidden) are filled"""
    biases = or_any(call.gate_bias, hidden), or_any(call.up_bias, hidden)
    weights = call.gate_weight, call.up_weight
    product(call.x, *weights, *biases, hidden, or_any(gate, hidden), or_any(up, hidden), hidden)


@remembered
def fwd_products(call: GatedMlpCall, precision: str) -> tuple[Product, Product] | tuple[()]:
    """Nothing where cuBLAS is faster"""
    if not fusing_is_faster(call):
        return ()
    down = linear_launch(call, hidden_layer(call), call.down_weight, (call.down_bias,), call.residual, False, "none")
    return first_product(call, call.save != "input"), down


def first_product(call: GatedMlpCall, keeps: bool) -> Product:
    biases = call.gate_bias, call.up_bias
    return linear_launch(call, call.x, call.gate_weight, biases, None, keeps, call.activation, call.up_weight)


@torch_op(fake=bwd_outputs, mutates=("gate_sum", "up_sum", "down_sum"))
def gated_mlp_bwd(
    call: GatedMlpCall,
    dout: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    hidden: Tensor | None,
    needs: list[bool],
    gate_sum: Tensor | None,
    up_sum: Tensor | None,
    down_sum: Tensor | None,
) -> Gradients:
    """dout: (M, d_out), gate, up, hidden: (M, hidden) -> gradients of x, both weights of the first layer, both of its
    biases, and both of the last one; those of weights are added to *_sum: like the weights, where these are given"""
    if call.x.shape[0] == 0:
        grads = bwd_outputs(call, dout, gate, up, hidden, needs, gate_sum, up_sum, down_sum)
        zero_(grads)
        return grads
    gate, up = gate_and_up(call, gate, up)
    wants_sums, remade = needs[3] or needs[4], None
    if needs[5] and call.save != "all":
        hidden = remade = torch.empty_like(gate)
    grad_up = torch.empty_like(up)
    product = bwd_product(call, dout, remade is not None, wants_sums, precision(dout.dtype))
    if product:
        launch, parts = product
        grad_gate = torch.empty_like(gate)
        partials = torch.empty(parts, dtype=torch.float32, device=dout.device) if wants_sums else None
        remade_or_any, partials_or_any = or_any(remade, grad_up), or_any(partials, grad_up)
        launch(dout, call.down_weight, gate, up, remade_or_any, grad_gate, grad_up, partials_or_any)
    else:
        grad_gate = dout @ call.down_weight
        partials = pointwise_grad_preact(grad_gate, gate, up, call.activation, remade, grad_up, wants_sums)
    first = first_layer_grads(call, grad_gate, grad_up, partials, needs, gate_sum, up_sum)
    grad_down = weight_grad(dout, hidden, call.down_weight, down_sum) if needs[5] and hidden is not None else None
    return *first, grad_down, column_sum(dout) if needs[6] else None


@remembered
def bwd_product(
    call: GatedMlpCall, dout: Tensor, has_act: bool, wants_partials: bool, precision: str
) -> tuple[Product, tuple[int, ...]] | tuple[()]:
    """-> with the shape of the partial sums; nothing where cuBLAS is faster"""
    if not fusing_is_faster(call):
        return ()
    return grad_preact_launch(call, dout, call.down_weight, has_act, wants_partials, gated=True)
