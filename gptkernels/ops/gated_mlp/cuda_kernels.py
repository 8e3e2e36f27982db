"""The gated MLP in CUDA C++ (csrc/mlp) for compute capability 9.0, on the MLP's kernels: a tile of the first product
has columns of gate and of up."""

import torch
from torch import Tensor

from ... import cuda_library, hardware
from ...cuda_library import Copies, Launch
from ...remembered import remembered
from ...torch_library import torch_op
from ..mlp.cuda_kernels import ACTIVATIONS as ONE_INPUT
from ..mlp.cuda_kernels import PARTIAL_ROWS, linear_launch, reason_against
from ..mlp.eager import column_sum, weight_grad
from ..rows import zero_
from .eager import first_layer_grads, gate_and_up
from .outputs import Forward, Gradients, bwd_outputs, fwd_outputs, hidden_layer
from .record import GatedMlpCall

# The numbers that csrc/mlp/mlp.h gives them.
ACTIVATIONS = ONE_INPUT | {"gpt_oss": 6}


def unsupported(call: GatedMlpCall) -> str | None:
    names = "x", "gate_weight", "up_weight", "residual"
    sizes = call.x.shape[-1], call.gate_weight.shape[0], call.down_weight.shape[0]
    return reason_against({name: getattr(call, name) for name in names}, sizes)


def gate_and_up_launch(call: GatedMlpCall, x: Tensor, gate_weight: Tensor, up_weight: Tensor) -> Launch:
    """Takes x: (M, K), gate_weight, up_weight: (N, K), gate_bias, up_bias: (N,), gate, up, out: (M, N) and makes
    out = activation(gate) * up, gate = x @ gate_weight.T + gate_bias, up likewise"""
    numbers = {
        "M": x.shape[0],
        "N": gate_weight.shape[0],
        "K": x.shape[1],
        "a_stride": x.stride(0),
        "gate_stride": gate_weight.stride(0),
        "up_stride": up_weight.stride(0),
        "activation": ACTIVATIONS[call.activation],
        "dtype": cuda_library.DTYPE[x.dtype],
        "sm_count": hardware.sm_count(x.device),
    }
    tensors = ("a", "gate_weight", "up_weight", "gate_bias", "up_bias", "gate", "up", "out")
    return Launch("gated_mlp_fwd", x.device, tensors, numbers)


def grads_launch(dout: Tensor, down_weight: Tensor, activation: str) -> tuple[Launch, tuple[int, int, int]]:
    """-> what takes dout: (M, K), down_weight: (K, N), gate, up, act, grad_gate, grad_up: (M, N), partials: (2, P, N)
    and makes the gradients of gate and up, the column sums of both in parts, and act = activation(gate) * up; and the
    shape of those parts"""
    (M, K), N = dout.shape, down_weight.shape[1]
    numbers = {
        "M": M,
        "N": N,
        "K": K,
        "dout_stride": dout.stride(0),
        "activation": ACTIVATIONS[activation],
        "dtype": cuda_library.DTYPE[dout.dtype],
        "sm_count": hardware.sm_count(dout.device),
    }
    tensors = ("dout", "weight", "gate", "up", "act", "grad_gate", "grad_up", "partials")
    launch = Launch("gated_mlp_bwd", dout.device, tensors, numbers)
    return launch, (2, (M + PARTIAL_ROWS - 1) // PARTIAL_ROWS, N)


@torch_op(fake=fwd_outputs)
def gated_mlp_fwd(call: GatedMlpCall) -> Forward:
    """-> out: (M, d_out), gate, up, hidden: (M, hidden)"""
    if call.x.shape[0] == 0:
        return fwd_outputs(call)
    copies, first, down = fwd_launches(call)
    out, gate, up, kept = fwd_outputs(call)
    x, gate_weight, up_weight, down_weight, residual = copies(*copied(call))
    hidden = hidden_layer(call) if kept is None else kept
    first(x, gate_weight, up_weight, call.gate_bias, call.up_bias, gate, up, hidden)
    down(hidden, down_weight, call.down_bias, residual, None, out)
    return out, gate, up, kept


def copied(call: GatedMlpCall) -> tuple[Tensor | None, ...]:
    """What has to be copied where the bulk copy engine cannot read it, as it may turn out under torch.compile"""
    return call.x, call.gate_weight, call.up_weight, call.down_weight, call.residual


@remembered
def fwd_launches(call: GatedMlpCall) -> tuple[Copies, Launch, Launch]:
    copies = Copies(*copied(call))
    x, gate_weight, up_weight, down_weight, residual = copies(*copied(call))
    down = linear_launch(hidden_layer(call), down_weight, residual)
    return copies, gate_and_up_launch(call, x, gate_weight, up_weight), down


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
    copies, launch, parts = bwd_launch(call, dout)
    gate, up = gate_and_up(call, gate, up)
    remade = None
    if needs[5] and call.save != "all":
        hidden = remade = torch.empty_like(gate)
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    partials = torch.empty(parts, dtype=torch.float32, device=dout.device) if needs[3] or needs[4] else None
    launch(*copies(dout, call.down_weight), gate, up, remade, grad_gate, grad_up, partials)
    first = first_layer_grads(call, grad_gate, grad_up, partials, needs, gate_sum, up_sum)
    grad_down = weight_grad(dout, hidden, call.down_weight, down_sum) if needs[5] and hidden is not None else None
    return *first, grad_down, column_sum(dout) if needs[6] else None


@remembered
def bwd_launch(call: GatedMlpCall, dout: Tensor) -> tuple[Copies, Launch, tuple[int, int, int]]:
    """-> with the shape of the partial sums"""
    copies = Copies(dout, call.down_weight)
    dout, down_weight = copies(dout, call.down_weight)
    return copies, *grads_launch(dout, down_weight, call.activation)
