"""The MLP with PyTorch's own kernels: every device and dtype, and what the others are measured against."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...torch_library import torch_op
from ..products import add_product
from .outputs import bwd_outputs, fwd_outputs, is_transposed

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
def mlp_fwd(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    save: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (M, d), fc_weight: (hidden, d), proj_weight: (d_out, hidden) -> out: (M, d_out), preact, act: (M, hidden)"""
    preact = linear(x, fc_weight, fc_bias)
    act = FORWARD[activation](preact)
    out = linear(act, proj_weight, proj_bias)
    if residual is not None:
        out += residual
    none = x.new_empty(0)
    return out, none if save == "input" else preact, act if save == "all" else none


@torch_op(fake=bwd_outputs, mutates=("fc_sum", "proj_sum"))
def mlp_bwd(
    dout: Tensor,
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    preact: Tensor,
    act: Tensor,
    activation: str,
    save: str,
    needs: list[bool],
    fc_sum: Tensor | None,
    proj_sum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dout: (M, d_out), x: (M, d), preact, act: (M, hidden) -> gradients of x, both of fc, both of proj; those of the
    weights are added to fc_sum: (hidden, d) and proj_sum: (d_out, hidden) instead, where these are given"""
    needs_x, needs_fc_weight, needs_fc_bias, needs_proj_weight, needs_proj_bias = needs
    none = x.new_empty(0)
    if save == "input":
        preact = linear(x, fc_weight, fc_bias)
    grad_proj_weight = none
    if needs_proj_weight:
        grad_proj_weight = weight_grad(
            dout, act if save == "all" else FORWARD[activation](preact), proj_weight, proj_sum
        )
    grad_proj_bias = column_sum(dout) if needs_proj_bias else none
    if not (needs_x or needs_fc_weight or needs_fc_bias):
        return none, none, none, grad_proj_weight, grad_proj_bias
    grad_preact = BACKWARD[activation](dout @ proj_weight, preact)
    # Freed here where it was only made again: with save="input", before there are more gradients.
    del preact
    return (
        grad_preact @ fc_weight if needs_x else none,
        weight_grad(grad_preact, x, fc_weight, fc_sum) if needs_fc_weight else none,
        column_sum(grad_preact) if needs_fc_bias else none,
        grad_proj_weight,
        grad_proj_bias,
    )


def other_grads(
    dout: Tensor,
    x: Tensor,
    fc_weight: Tensor,
    proj_weight: Tensor,
    act: Tensor,
    grad_preact: Tensor,
    partials: Tensor | None,
    needs: list[bool],
    fc_sum: Tensor | None,
    proj_sum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """mlp_bwd's results, where kernels have made grad_preact: (M, hidden) and its column sums in parts: (P, hidden)"""
    needs_x, needs_fc_weight, _, needs_proj_weight, needs_proj_bias = needs
    none = torch.empty((0,), dtype=x.dtype, device=x.device)
    return (
        grad_preact @ fc_weight if needs_x else none,
        weight_grad(grad_preact, x, fc_weight, fc_sum) if needs_fc_weight else none,
        none if partials is None else partials.sum(0).to(x.dtype),
        weight_grad(dout, act, proj_weight, proj_sum) if needs_proj_weight else none,
        column_sum(dout) if needs_proj_bias else none,
    )


def weight_grad(grad: Tensor, x: Tensor, weight: Tensor, total: Tensor | None) -> Tensor:
    """grad: (M, N), x: (M, K) -> grad.mT @ x: (N, K), in memory as the weight is; or added to total: (N, K)"""
    if total is not None:
        add_product(total, grad.mT, x)
        return x.new_empty(0)
    return (x.mT @ grad).mT if is_transposed(weight) else grad.mT @ x


def column_sum(x: Tensor) -> Tensor:
    """(M, N) -> (N,), accumulated in float32"""
    return x.sum(0, dtype=torch.float32).to(x.dtype)
