"""What the launchers return, allocated: shared by every backend, and by torch.compile as the fake implementation.

Outputs that a call does not have are empty tensors, because a torch.library op cannot return None.
"""

import torch
from torch import Tensor


def fwd_outputs(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    save: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (M, d), fc_weight: (hidden, d), proj_weight: (d_out, hidden) -> out: (M, d_out), and as far as `save` asks for
    them the input of the activation and its output: (M, hidden)"""
    hidden = (x.shape[0], fc_weight.shape[0])
    out = torch.empty((x.shape[0], proj_weight.shape[0]), dtype=x.dtype, device=x.device)
    preact = torch.empty(hidden if save != "input" else (0,), dtype=x.dtype, device=x.device)
    act = torch.empty(hidden if save == "all" else (0,), dtype=x.dtype, device=x.device)
    return out, preact, act


def bwd_outputs(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """needs: whether the gradients of x, fc_weight, fc_bias, proj_weight and proj_bias are wanted -> those gradients"""
    shapes = (x.shape, fc_weight.shape, fc_weight.shape[:1], proj_weight.shape, proj_weight.shape[:1])
    return tuple(
        torch.empty(shape if needed else (0,), dtype=x.dtype, device=x.device)
        for shape, needed in zip(shapes, needs, strict=True)
    )
