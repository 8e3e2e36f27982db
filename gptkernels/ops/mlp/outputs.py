"""What the launchers return, allocated: shared by every backend, and by torch.compile as the fake implementation.

Outputs that a call does not have are empty tensors, because a torch.library op cannot return None.
"""

import torch
from torch import Tensor

# The fewest rows for which weights that lie in memory as (in, out) are copied for the fused products. The copies take
# as long as the products of about 300 rows.
COPIES_FROM_ROWS = 4096


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
    fc_sum: Tensor | None,
    proj_sum: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """needs: whether the gradients of x, fc_weight, fc_bias, proj_weight and proj_bias are wanted -> those gradients"""
    needs = [needs[0], needs[1] and fc_sum is None, needs[2], needs[3] and proj_sum is None, needs[4]]
    shapes = (x.shape, fc_weight.shape, fc_weight.shape[:1], proj_weight.shape, proj_weight.shape[:1])
    transposed = (False, is_transposed(fc_weight), False, is_transposed(proj_weight), False)

    def grad(shape, columns_first):
        shape = shape[::-1] if columns_first else shape
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        return out.mT if columns_first else out

    x_grad, fc_weight_grad, fc_bias_grad, proj_weight_grad, proj_bias_grad = (
        grad(shape, columns_first) if needed else grad((0,), False)
        for shape, columns_first, needed in zip(shapes, transposed, needs, strict=True)
    )
    return x_grad, fc_weight_grad, fc_bias_grad, proj_weight_grad, proj_bias_grad


def is_transposed(weight: Tensor) -> bool:
    """Whether a weight (out, in) lies in memory as (in, out), as GPT-2's do in transformers."""
    return not weight.is_contiguous() and weight.mT.is_contiguous()


def copies_cost_more(x: Tensor, fc_weight: Tensor, proj_weight: Tensor) -> bool:
    """Whether weights would have to be copied for a fused product of x: (..., d), and there are too few rows for it."""
    rows = x.numel() // x.shape[-1]
    return rows < COPIES_FROM_ROWS and (is_transposed(fc_weight) or is_transposed(proj_weight))
