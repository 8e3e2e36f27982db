"""Matrix products that PyTorch has under no name of its own."""

import torch
from torch import Tensor


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total: (N, K), float32 or of the operands' dtype, += a @ b: (N, M), (M, K), whose product is not rounded before
    it is added"""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
