"""PyTorch's own ops: for the calls where nothing is gained over them, those on a CPU that keep the hidden layer, and as
a backend that `auto` takes where it was measured to be the fastest."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import DTYPES
from ..native import is_plain
from ..products import SUM
from .eager import FORWARD
from .record import MlpCall

# Not relu2, which squares in place what autograd would want to keep.
ACTIVATIONS = {name: FORWARD[name] for name in ("gelu_tanh", "gelu", "relu", "silu")}


def native_mlp(
    x=None,
    fc_weight=None,
    fc_bias=None,
    proj_weight=None,
    proj_bias=None,
    *,
    activation="gelu_tanh",
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
        or not is_linear(dtype, fc_weight, fc_bias)
        or not is_linear(dtype, proj_weight, proj_bias)
        or not is_choice(activation, ACTIVATIONS)
        or not is_choice(save, ("all", "preact"))
        or not fits(residual, (*x.shape[:-1], proj_weight.shape[0]), dtype)
        or torch._C._is_any_autocast_enabled()
    ):
        return NotImplemented
    return run(MlpCall(x, fc_weight, fc_bias, proj_weight, proj_bias, residual, activation, save))


def unsupported(call: MlpCall) -> str | None:
    if call.activation not in ACTIVATIONS:
        return f"has no {call.activation}"
    return None if call.save == "all" else f"keeps the hidden layer twice, which save={call.save!r} does not ask for"


def run(call: MlpCall) -> Tensor:
    """With PyTorch's own autograd. x may have any number of dimensions here."""
    hidden = ACTIVATIONS[call.activation](F.linear(call.x, call.fc_weight, call.fc_bias))
    out = F.linear(hidden, call.proj_weight, call.proj_bias)
    return out if call.residual is None else out + call.residual


def is_linear(dtype: torch.dtype, weight, bias) -> bool:
    """Its size is left to PyTorch to refuse."""
    own_sum = getattr(weight, SUM, None) is not None
    return not own_sum and is_plain(weight, dtype) and weight.ndim == 2 and fits(bias, weight.shape[:1], dtype)


def fits(tensor, shape: tuple, dtype: torch.dtype) -> bool:
    return tensor is None or (is_plain(tensor, dtype) and tensor.shape == shape)


def is_choice(value, choices) -> bool:
    return type(value) is str and value in choices
