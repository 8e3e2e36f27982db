"""The MLP of a transformer block, read aloud. Any dtype including float64; what tests and benchmarks compare with."""

import math

import torch
from torch import Tensor

ACTIVATIONS = {
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "silu": lambda x: x * torch.sigmoid(x),
}


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    residual: Tensor | None = None,
) -> Tensor:
    """x: (..., d), fc_weight: (hidden, d), proj_weight: (d_out, hidden), biases: (hidden,), (d_out,),
    residual: (..., d_out) -> (..., d_out)"""
    hidden = x @ fc_weight.mT
    hidden = hidden if fc_bias is None else hidden + fc_bias
    out = ACTIVATIONS[activation](hidden) @ proj_weight.mT
    out = out if proj_bias is None else out + proj_bias
    return out if residual is None else out + residual
