"""The MLP with PyTorch's own kernels: every device and dtype, and what the others are measured against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...torch_library import torch_op
from ..products import add_product
from .outputs import bwd_outputs, fwd_outputs, is_transposed
from .record import MlpCall

FORWARD = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square_(),
    "silu": F.silu,
}
# The gradient of the activation's output becomes that of its input, in place.
BACKWARD = {
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad),
    "gelu": lambda grad, x: torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad),
    "relu": lambda grad, x: torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad),
    "relu2": lambda grad, x: grad.mul_(F.relu(x).mul_(2)),
    "silu": lambda grad, x: torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad),
}


def unsupported(*_) -> str | None:
    return None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: (M, K), weight: (N, K), bias: (N,) -> (M, N)"""
    return x @ weight.mT if bias is None else torch.addmm(bias, x, weight.mT)


@torch_op(fake=fwd_outputs)
def mlp_fwd(call: MlpCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> out: (M, d_out), preact, act: (M, hidden)"""
    preact = linear(call.x, call.fc_weight, call.fc_bias)
    act = FORWARD[call.activation](preact)
    out = linear(act, call.proj_weight, call.proj_bias)
    if call.residual is not None:
        out += call.residual
    return out, None if call.save == "input" else preact, act if call.save == "all" else None


@torch_op(fake=bwd_outputs, mutates=("fc_sum", "proj_sum"))
def mlp_bwd(
    call: MlpCall,
    dout: Tensor,
    preact: Tensor | None,
    act: Tensor | None,
    needs: list[bool],
    fc_sum: Tensor | None,
    proj_sum: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dout: (M, d_out), preact, act: (M, hidden) -> gradients of x, both of fc, both of proj; those of the weights are
    added to fc_sum: (hidden, d) and proj_sum: (d_out, hidden) instead, where these are given"""
    needs_x, needs_fc_weight, needs_fc_bias, needs_proj_weight, needs_proj_bias = needs
    preact = preact_of(call, preact)
    grad_proj_weight = None
    if needs_proj_weight:
        hidden = FORWARD[call.activation](preact) if act is None or call.save != "all" else act
        grad_proj_weight = weight_grad(dout, hidden, call.proj_weight, proj_sum)
        del hidden
    grad_proj_bias = column_sum(dout) if needs_proj_bias else None
    if not (needs_x or needs_fc_weight or needs_fc_bias):
        return None, None, None, grad_proj_weight, grad_proj_bias
    grad_preact = BACKWARD[call.activation](dout @ call.proj_weight, preact)
    # Freed here where it was only made again: with save="input", before there are more gradients.
    del preact
    return (
        grad_preact @ call.fc_weight if needs_x else None,
        weight_grad(grad_preact, call.x, call.fc_weight, fc_sum) if needs_fc_weight else None,
        column_sum(grad_preact) if needs_fc_bias else None,
        grad_proj_weight,
        grad_proj_bias,
    )


def preact_of(call: MlpCall, kept: Tensor | None) -> Tensor:
    """-> (M, hidden), made again where it was not kept"""
    return linear(call.x, call.fc_weight, call.fc_bias) if kept is None or call.save == "input" else kept


def other_grads(
    call: MlpCall,
    dout: Tensor,
    act: Tensor | None,
    grad_preact: Tensor,
    partials: Tensor | None,
    needs: list[bool],
    fc_sum: Tensor | None,
    proj_sum: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """mlp_bwd's results, where kernels have made grad_preact: (M, hidden) and its column sums in parts: (P, hidden)"""
    needs_x, needs_fc_weight, _, needs_proj_weight, needs_proj_bias = needs
    return (
        grad_preact @ call.fc_weight if needs_x else None,
        weight_grad(grad_preact, call.x, call.fc_weight, fc_sum) if needs_fc_weight else None,
        None if partials is None else partials.sum(0).to(dout.dtype),
        weight_grad(dout, act, call.proj_weight, proj_sum) if needs_proj_weight and act is not None else None,
        column_sum(dout) if needs_proj_bias else None,
    )


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, total: Tensor | None) -> Tensor | None:
    """grad: (M, N), x: (M, K) -> grad.mT @ x: (N, K), in memory as the weight is; or added to total: (N, K)"""
    if total is not None:
        add_product(total, grad.mT, x)
        return None
    return (x.mT @ grad).mT if is_transposed(weight) else grad.mT @ x


def column_sum(x: Tensor) -> Tensor:
    """(M, N) -> (N,), accumulated in float32"""
    return x.sum(0, dtype=torch.float32).to(x.dtype)
