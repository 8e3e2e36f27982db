"""The gated MLP with PyTorch's own kernels: every device and dtype, and what the others are measured against."""

import torch
from torch import Tensor

from ...torch_library import torch_op
from ..mlp import eager as mlp
from ..mlp.eager import column_sum, linear, weight_grad
from ..products import sum_of_products
from .outputs import Forward, Gradients, bwd_outputs, fwd_outputs
from .record import GatedMlpCall

LIMIT, SHARPNESS = 7.0, 1.702  # of gpt-oss


def unsupported(*_) -> str | None:
    return None


def gate_and_up(call: GatedMlpCall, gate: Tensor | None, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> both (M, hidden), made again where they were not kept"""
    if gate is not None and up is not None and call.save != "input":
        return gate, up
    return linear(call.x, call.gate_weight, call.gate_bias), linear(call.x, call.up_weight, call.up_bias)


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: (M, hidden) -> a new (M, hidden)"""
    if activation == "gpt_oss":
        return gpt_oss_gate(gate)[0].mul_(up.clamp(-LIMIT, LIMIT).add_(1))
    return mlp.FORWARD[activation](gate).mul_(up)


def gpt_oss_gate(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> what up + 1 is multiplied with, and the two that it is the product of"""
    gate = gate.clamp(max=LIMIT)
    share = (gate * SHARPNESS).sigmoid_()
    return gate * share, gate, share


def gated_grads(activation: str, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """grad: (M, hidden), which is overwritten -> gradients of gate and up: (M, hidden)"""
    if activation != "gpt_oss":
        grad_up = mlp.FORWARD[activation](gate).mul_(grad)
        return mlp.BACKWARD[activation](grad.mul_(up), gate), grad_up
    act, clamped, share = gpt_oss_gate(gate)
    grad_up = act.mul_(grad).masked_fill_(~((up >= -LIMIT) & (up <= LIMIT)), 0)
    grad = grad.mul_(up.clamp(-LIMIT, LIMIT).add_(1))
    through_share = torch.ops.aten.sigmoid_backward(grad * clamped, share).mul_(SHARPNESS)
    return grad.mul_(share).add_(through_share).masked_fill_(~(gate <= LIMIT), 0), grad_up


@torch_op(fake=fwd_outputs)
def gated_mlp_fwd(call: GatedMlpCall) -> Forward:
    """-> out: (M, d_out), gate, up, hidden: (M, hidden)"""
    gate, up = gate_and_up(call, None, None)
    hidden = gated(call.activation, gate, up)
    out = linear(hidden, call.down_weight, call.down_bias)
    if call.residual is not None:
        out += call.residual
    if call.save == "input":
        return out, None, None, None
    return out, gate, up, hidden if call.save == "all" else None


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
    gate, up = gate_and_up(call, gate, up)
    grad_down = None
    if needs[5]:
        hidden = gated(call.activation, gate, up) if hidden is None or call.save != "all" else hidden
        grad_down = weight_grad(dout, hidden, call.down_weight, down_sum)
    del hidden
    grad_gate = grad_up = None
    if any(needs[:5]):
        grad_gate, grad_up = gated_grads(call.activation, dout @ call.down_weight, gate, up)
    # Freed here where they were only made again: with save="input", before there are more gradients.
    del gate, up
    first = first_layer_grads(call, grad_gate, grad_up, None, needs, gate_sum, up_sum)
    return *first, grad_down, column_sum(dout) if needs[6] else None


def first_layer_grads(
    call: GatedMlpCall,
    grad_gate: Tensor | None,
    grad_up: Tensor | None,
    partials: Tensor | None,
    needs: list[bool],
    gate_sum: Tensor | None,
    up_sum: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """grad_gate, grad_up: (M, hidden), partials: (2, P, hidden) of their column sums, where kernels have made these ->
    gradients of x, gate_weight, up_weight, gate_bias, up_bias"""
    if grad_gate is None or grad_up is None:
        return None, None, None, None, None
    if partials is None:
        gate_bias, up_bias = (column_sum(g) if n else None for g, n in ((grad_gate, needs[3]), (grad_up, needs[4])))
    else:
        # Copied: the sum of one row may be that row, and two results must not be parts of one tensor.
        sums = (rows.sum(0).to(grad_gate.dtype, copy=True) for rows in partials)
        gate_bias, up_bias = (each if needed else None for each, needed in zip(sums, needs[3:5], strict=True))
    return (
        sum_of_products(grad_gate, call.gate_weight, grad_up, call.up_weight) if needs[0] else None,
        weight_grad(grad_gate, call.x, call.gate_weight, gate_sum) if needs[1] else None,
        weight_grad(grad_up, call.x, call.up_weight, up_sum) if needs[2] else None,
        gate_bias,
        up_bias,
    )
