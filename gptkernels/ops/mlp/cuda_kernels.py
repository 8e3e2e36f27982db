"""The MLP in CUDA C++ (csrc/mlp) for compute capability 9.0: products with fused epilogues, in both directions."""

import torch
from torch import Tensor

from ... import cuda_library, hardware
from ...torch_library import torch_op
from . import eager
from .eager import linear, other_grads
from .outputs import bwd_outputs, copies_cost_more, fwd_outputs

# The numbers that csrc/mlp/mlp.h gives them.
ACTIVATIONS = {"none": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "relu2": 4, "silu": 5}
# Of how many rows each partial sum is: those of a warpgroup.
PARTIAL_ROWS = 64
# CTAs that work together on tiles below each other.
CLUSTER = 2
MAX_ROWS = 1 << 30


def unsupported(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    residual: Tensor | None,
    *_,
) -> str | None:
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {x.dtype}"
    sizes = x.shape[-1], *fc_weight.shape[:1], *proj_weight.shape[:1]
    if any(size % 8 for size in sizes):
        return f"takes sizes of layers that are multiples of 8, not {', '.join(map(str, sizes))}"
    if x.numel() // x.shape[-1] > MAX_ROWS:
        return f"takes up to {MAX_ROWS} rows"
    tensors = {"x": x, "fc_weight": fc_weight, "proj_weight": proj_weight, "residual": residual}
    for name, tensor in tensors.items():
        # Weights that lie in memory as (in, out) are copied anyway.
        reason = None if tensor is None or tensor.stride(-1) != 1 else cuda_library.not_addressable(tensor)
        if reason:
            return f"{name} {reason}"
    if hardware.sm_count(x.device) < CLUSTER:
        return f"needs {CLUSTER} multiprocessors, which share the weight's tiles; this GPU has 1"
    return cuda_library.unsupported(x.device, only_arch=90)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    preact: Tensor | None = None,
    out: Tensor,
) -> None:
    """out: (M, N) = activation(x @ weight.T + bias) + residual, or preact: (M, N) = x @ weight.T + bias beside it.
    x: (M, K), weight: (N, K), bias: (N,), residual: (M, N)"""
    fields = {
        "a": x,
        "weight": weight,
        "bias": bias,
        "residual": residual,
        "preact": preact,
        "out": out,
        "M": out.shape[0],
        "N": out.shape[1],
        "K": x.shape[1],
        "a_stride": x.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0),
        "activation": ACTIVATIONS[activation],
        "dtype": cuda_library.DTYPE[x.dtype],
        "sm_count": hardware.sm_count(x.device),
    }
    cuda_library.launch("mlp_fwd", x.device, fields)


def fused_grad_preact(
    dout: Tensor, proj_weight: Tensor, preact: Tensor, activation: str, act: Tensor | None, wants_partials: bool
) -> tuple[Tensor, Tensor | None]:
    """-> dout @ proj_weight * activation'(preact): (M, N), and its column sums in parts: (P, N). act: (M, N) is filled.
    dout: (M, K), proj_weight: (K, N), preact: (M, N)"""
    grad = torch.empty(preact.shape, dtype=dout.dtype, device=dout.device)
    parts = ((preact.shape[0] + PARTIAL_ROWS - 1) // PARTIAL_ROWS, preact.shape[1])
    partials = torch.empty(parts, dtype=torch.float32, device=dout.device) if wants_partials else None
    fields = {
        "dout": dout,
        "weight": proj_weight,
        "preact": preact,
        "act": act,
        "grad": grad,
        "partials": partials,
        "M": preact.shape[0],
        "N": preact.shape[1],
        "K": dout.shape[1],
        "dout_stride": dout.stride(0),
        "activation": ACTIVATIONS[activation],
        "dtype": cuda_library.DTYPE[dout.dtype],
        "sm_count": hardware.sm_count(dout.device),
    }
    cuda_library.launch("mlp_bwd", dout.device, fields)
    return grad, partials


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
    outputs = out, preact, act = fwd_outputs(x, fc_weight, fc_bias, proj_weight, proj_bias, residual, activation, save)
    if x.shape[0] == 0:
        return outputs
    if copies_cost_more(x, fc_weight, proj_weight):
        return eager.mlp_fwd(x, fc_weight, fc_bias, proj_weight, proj_bias, residual, activation, save)
    x, fc_weight, proj_weight = cuda_library.addressable(x, fc_weight, proj_weight)
    if residual is not None:
        (residual,) = cuda_library.addressable(residual)
    hidden = act if save == "all" else torch.empty((x.shape[0], fc_weight.shape[0]), dtype=x.dtype, device=x.device)
    kept = None if save == "input" else preact
    fused_linear(x, fc_weight, fc_bias, activation=activation, preact=kept, out=hidden)
    fused_linear(hidden, proj_weight, proj_bias, residual=residual, out=out)
    return outputs


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
    if x.shape[0] == 0:
        grads = bwd_outputs(
            dout, x, fc_weight, fc_bias, proj_weight, preact, act, activation, save, needs, fc_sum, proj_sum
        )
        for grad in grads:
            grad.zero_()
        return grads
    if copies_cost_more(x, fc_weight, proj_weight):
        return eager.mlp_bwd(
            dout, x, fc_weight, fc_bias, proj_weight, preact, act, activation, save, needs, fc_sum, proj_sum
        )
    if save == "input":
        preact = linear(x, fc_weight, fc_bias)
    remade = None
    if needs[3] and save != "all":
        act = remade = torch.empty_like(preact)
    dout_read, weight_read = cuda_library.addressable(dout, proj_weight)
    grad, partials = fused_grad_preact(dout_read, weight_read, preact, activation, remade, wants_partials=needs[2])
    return other_grads(dout, x, fc_weight, proj_weight, act, grad, partials, needs, fc_sum, proj_sum)
