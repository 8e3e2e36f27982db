"""PyTorch's own ops: for the calls where nothing is gained over them, those on a CPU that keep the hidden layer, and as
a backend that `auto` takes where it was measured to be the fastest."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import DTYPES
from ..mlp import native as mlp
from ..mlp.native import fits, is_choice, is_linear
from ..native import is_plain
from .eager import LIMIT, SHARPNESS
from .record import GatedMlpCall

ACTIVATIONS = (*mlp.ACTIVATIONS, "gpt_oss")


def native_gated_mlp(
    x=None,
    gate_weight=None,
    up_weight=None,
    down_weight=None,
    *,
    gate_bias=None,
    up_bias=None,
    down_bias=None,
    activation="silu",
    residual=None,
    save="preact",
    backend="auto",
):
    """Gets what the caller passed, which may be anything, and answers NotImplemented where it is something else."""
    dtype = getattr(x, "dtype", None)
    if (
        not is_choice(backend, ("auto", "eager"))
        or dtype not in DTYPES
        or not is_plain(x, dtype)
        or x.numel() == 0
        or not is_linear(dtype, gate_weight, gate_bias)
        or not is_linear(dtype, up_weight, up_bias)
        or gate_weight.shape != up_weight.shape
        or not is_linear(dtype, down_weight, down_bias)
        or not is_choice(activation, ACTIVATIONS)
        or not is_choice(save, ("all", "preact"))
        or not fits(residual, (*x.shape[:-1], down_weight.shape[0]), dtype)
        or torch._C._is_any_autocast_enabled()
    ):
        return NotImplemented
    tensors = x, gate_weight, up_weight, gate_bias, up_bias, down_weight, down_bias, residual
    return run(GatedMlpCall(*tensors, activation, save))


def unsupported(call: GatedMlpCall) -> str | None:
    if call.activation not in ACTIVATIONS:
        return f"has no {call.activation}"
    return None if call.save == "all" else f"keeps the hidden layer four times, not as save={call.save!r} asks for"


def run(call: GatedMlpCall) -> Tensor:
    """With PyTorch's own autograd. x may have any number of dimensions here."""
    gate = F.linear(call.x, call.gate_weight, call.gate_bias)
    up = F.linear(call.x, call.up_weight, call.up_bias)
    if call.activation == "gpt_oss":
        gate, up = gate.clamp(max=LIMIT), up.clamp(-LIMIT, LIMIT)
        hidden = (up + 1) * (gate * torch.sigmoid(gate * SHARPNESS))
    else:
        hidden = mlp.ACTIVATIONS[call.activation](gate) * up
    out = F.linear(hidden, call.down_weight, call.down_bias)
    return out if call.residual is None else out + call.residual
