"""What the launchers return, allocated: shared by every backend, and by torch.compile as the fake implementation."""

import torch
from torch import Tensor

from .record import MlpCall

# The fewest rows for which weights that lie in memory as (in, out) are copied for the fused products. The copies take
# as long as the products of about 300 rows.
COPIES_FROM_ROWS = 4096


def fwd_outputs(call: MlpCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> out: (M, d_out), and as far as `save` asks for them the input of the activation and its output: (M, hidden)"""
    preact = None if call.save == "input" else hidden_layer(call)
    act = hidden_layer(call) if call.save == "all" else None
    return empty(call.x, call.proj_weight), preact, act


def hidden_layer(call: MlpCall) -> Tensor:
    """-> (M, hidden)"""
    return empty(call.x, call.fc_weight)


def empty(x: Tensor, weight: Tensor) -> Tensor:
    """x: (M, K), weight: (N, K) -> (M, N)"""
    size = weight.shape[0]
    return torch.empty_strided((x.shape[0], size), (size, 1), dtype=x.dtype, device=x.device)


def bwd_outputs(
    call: MlpCall,
    dout: Tensor,
    preact: Tensor | None,
    act: Tensor | None,
    needs: list[bool],
    fc_sum: Tensor | None,
    proj_sum: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """needs: whether the gradients of x, fc_weight, fc_bias, proj_weight and proj_bias are wanted -> those gradients"""
    x, fc_weight, proj_weight = call.x, call.fc_weight, call.proj_weight
    needs = [needs[0], needs[1] and fc_sum is None, needs[2], needs[3] and proj_sum is None, needs[4]]
    shapes = (x.shape, fc_weight.shape, fc_weight.shape[:1], proj_weight.shape, proj_weight.shape[:1])
    transposed = (False, is_transposed(fc_weight), False, is_transposed(proj_weight), False)

    def grad(shape, columns_first):
        shape = shape[::-1] if columns_first else shape
        out = torch.empty(shape, dtype=x.dtype, device=x.device)
        return out.mT if columns_first else out

    x_grad, fc_weight_grad, fc_bias_grad, proj_weight_grad, proj_bias_grad = (
        grad(shape, columns_first) if needed else None
        for shape, columns_first, needed in zip(shapes, transposed, needs, strict=True)
    )
    return x_grad, fc_weight_grad, fc_bias_grad, proj_weight_grad, proj_bias_grad


def is_transposed(weight: Tensor) -> bool:
    """Whether a weight (out, in) lies in memory as (in, out), as GPT-2's do in transformers."""
    return not weight.is_contiguous() and weight.mT.is_contiguous()


def copies_cost_more(call: MlpCall) -> bool:
    """Whether weights would have to be copied for a fused product, and there are too few rows for it."""
    return call.x.shape[0] < COPIES_FROM_ROWS and (is_transposed(call.fc_weight) or is_transposed(call.proj_weight))
