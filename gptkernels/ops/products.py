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


def sum_of_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """a @ b + c @ d, (N, M), (M, K) each -> (N, K), rounded once"""
    if a.dtype == torch.float32:
        return torch.addmm(a @ b, c, d)
    if a.device.type == "cpu":
        return torch.cat((a, c), 1) @ torch.cat((b, d))
    total = torch.empty((a.shape[0], b.shape[1]), dtype=torch.float32, device=a.device)
    add_product(total, a, b, first=True)
    add_product(total, c, d)
    return total.to(a.dtype)
