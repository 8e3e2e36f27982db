"""The MLP in CUDA C++ (csrc/mlp) for compute capability 9.0: products with fused epilogues, in both directions."""

import torch
from torch import Tensor

from ... import cuda_library, hardware
from ...cuda_library import Copies, Launch
from ...remembered import remembered
from ...torch_library import torch_op
from ..rows import zero_
from . import eager
from .eager import other_grads, preact_of
from .outputs import bwd_outputs, copies_cost_more, fwd_outputs, hidden_layer
from .record import MlpCall

# The numbers that csrc/mlp/mlp.h gives them.
ACTIVATIONS = {"none": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "relu2": 4, "silu": 5}
# Of how many rows each partial sum is: those of a warpgroup.
PARTIAL_ROWS = 64
# CTAs that work together on tiles below each other.
CLUSTER = 2
MAX_ROWS = 1 << 30


def unsupported(call: MlpCall) -> str | None:
    sizes = call.x.shape[-1], call.fc_weight.shape[0], call.proj_weight.shape[0]
    return reason_against({n: getattr(call, n) for n in ("x", "fc_weight", "proj_weight", "residual")}, sizes)


def reason_against(tensors: dict[str, Tensor | None], sizes: tuple[int, ...]) -> str | None:
    """tensors: x and others that the bulk copy engine reads. sizes: of the layers"""
    x = tensors["x"]
    assert x is not None
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, not {x.dtype}"
    if any(size % 8 for size in sizes):
        return f"takes sizes of layers that are multiples of 8, not {', '.join(map(str, sizes))}"
    if x.shape[0] > MAX_ROWS:
        return f"takes up to {MAX_ROWS} rows"
    for name, tensor in tensors.items():
        # Weights that lie in memory as (in, out) are copied anyway.
        reason = None if tensor is None or tensor.stride(-1) != 1 else cuda_library.not_addressable(tensor)
        if reason:
            return f"{name} {reason}"
    if hardware.sm_count(x.device) < CLUSTER:
        return f"needs {CLUSTER} multiprocessors, which share the weight's tiles; this GPU has 1"
    return cuda_library.unsupported(x.device, only_arch=90)


def linear_launch(x: Tensor, weight: Tensor, residual: Tensor | None, activation: str = "none") -> Launch:
    """Takes x: (M, K), weight: (N, K), bias: (N,), residual: (M, N), preact, out: (M, N) and makes
    out = activation(x @ weight.T + bias) + residual, preact = x @ weight.T + bias"""
    numbers = {
        "M": x.shape[0],
        "N": weight.shape[0],
        "K": x.shape[1],
        "a_stride": x.stride(0),
        "residual_stride": 0 if residual is None else residual.stride(0),
        "activation": ACTIVATIONS[activation],
        "dtype": cuda_library.DTYPE[x.dtype],
        "sm_count": hardware.sm_count(x.device),
    }
    return Launch("mlp_fwd", x.device, ("a", "weight", "bias", "residual", "preact", "out"), numbers)


def grad_preact_launch(dout: Tensor, proj_weight: Tensor, activation: str) -> tuple[Launch, tuple[int, int]]:
    """-> what takes dout: (M, K), proj_weight: (K, N), preact, act, grad: (M, N), partials: (P, N) and makes
    grad = dout @ proj_weight * activation'(preact), its column sums in parts, and act = activation(preact); and the
    shape of those parts"""
    (M, K), N = dout.shape, proj_weight.shape[1]
    numbers = {
        "M": M,
        "N": N,
        "K": K,
        "dout_stride": dout.stride(0),
        "activation": ACTIVATIONS[activation],
        "dtype": cuda_library.DTYPE[dout.dtype],
        "sm_count": hardware.sm_count(dout.device),
    }
    launch = Launch("mlp_bwd", dout.device, ("dout", "weight", "preact", "act", "grad", "partials"), numbers)
    return launch, ((M + PARTIAL_ROWS - 1) // PARTIAL_ROWS, N)


@torch_op(fake=fwd_outputs)
def mlp_fwd(call: MlpCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> out: (M, d_out), preact, act: (M, hidden)"""
    if call.x.shape[0] == 0:
        return fwd_outputs(call)
    launches = fwd_launches(call)
    if not launches:
        return eager.mlp_fwd(call)
    copies, fc, proj = launches
    out, preact, act = fwd_outputs(call)
    x, fc_weight, proj_weight, residual = copies(call.x, call.fc_weight, call.proj_weight, call.residual)
    hidden = hidden_layer(call) if act is None else act
    fc(x, fc_weight, call.fc_bias, None, preact, hidden)
    proj(hidden, proj_weight, call.proj_bias, residual, None, out)
    return out, preact, act


@remembered
def fwd_launches(call: MlpCall) -> tuple[Copies, Launch, Launch] | tuple[()]:
    """-> of both products; nothing where weights would have to be copied for too few rows"""
    if copies_cost_more(call):
        return ()
    copies = Copies(call.x, call.fc_weight, call.proj_weight, call.residual)
    x, fc_weight, proj_weight, residual = copies(call.x, call.fc_weight, call.proj_weight, call.residual)
    fc, proj = (
        linear_launch(x, fc_weight, None, call.activation),
        linear_launch(hidden_layer(call), proj_weight, residual),
    )
    return copies, fc, proj


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
    if call.x.shape[0] == 0:
        grads = bwd_outputs(call, dout, preact, act, needs, fc_sum, proj_sum)
        zero_(grads)
        return grads
    launches = bwd_launch(call, dout)
    if not launches:
        return eager.mlp_bwd(call, dout, preact, act, needs, fc_sum, proj_sum)
    copies, launch, parts = launches
    preact = preact_of(call, preact)
    remade = None
    if needs[3] and call.save != "all":
        act = remade = torch.empty_like(preact)
    grad = torch.empty_like(preact)
    partials = torch.empty(parts, dtype=torch.float32, device=dout.device) if needs[2] else None
    launch(*copies(dout, call.proj_weight), preact, remade, grad, partials)
    return other_grads(call, dout, act, grad, partials, needs, fc_sum, proj_sum)


@remembered
def bwd_launch(call: MlpCall, dout: Tensor) -> tuple[Copies, Launch, tuple[int, int]] | tuple[()]:
    """-> with the shape of the partial sums; nothing where weights would have to be copied for too few rows"""
    if copies_cost_more(call):
        return ()
    copies = Copies(dout, call.proj_weight)
    dout, proj_weight = copies(dout, call.proj_weight)
    return copies, *grad_preact_launch(dout, proj_weight, call.activation)
