"""Matrix products that PyTorch has under no name of its own."""

import torch
from torch import Tensor

# The attribute of a weight whose gradient is added to a tensor: that tensor
SUM = "gptkernels_gradient_sum"


def add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool = False) -> None:
    """total: (N, K), float32 or of the operands' dtype, += a @ b: (N, M), (M, K), whose product is not rounded before
    it is added. first: nothing is in total yet, not even zeros."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, beta=beta, out=total)
    else:
        total.addmm_(a.float(), b.float(), beta=beta)
