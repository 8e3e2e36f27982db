"""The gated MLP of a transformer block, read aloud. Any dtype including float64; what tests and benchmarks compare
with."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..mlp.reference import ACTIVATIONS as ONE_INPUT


def product(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    return act(gate) * up


def gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=7), up.clamp(-7, 7)
    return (up + 1) * (gate * torch.sigmoid(1.702 * gate))


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: partial(product, act) for name, act in ONE_INPUT.items()},
    "gpt_oss": gpt_oss,
}


def gated_mlp(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    activation: str = "silu",
    residual: Tensor | None = None,
) -> Tensor:
    """x: (..., d), gate_weight, up_weight: (hidden, d), down_weight: (d_out, hidden), gate_bias, up_bias: (hidden,),
    down_bias: (d_out,), residual: (..., d_out) -> (..., d_out)"""
    gate, up = x @ gate_weight.mT, x @ up_weight.mT
    gate = gate if gate_bias is None else gate + gate_bias
    up = up if up_bias is None else up + up_bias
    out = ACTIVATIONS[activation](gate, up) @ down_weight.mT
    out = out if down_bias is None else out + down_bias
    return out if residual is None else out + residual
