"""The loss of a language model, read aloud. Any dtype including float64; what tests and benchmarks compare with."""

import torch
from torch import Tensor


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """x: (..., d), weight: (V, d), targets: (...) int64 -> () or, with reduction="none", (...)"""
    logits = x @ weight.mT
    logits = logits if logits.dtype == torch.float64 else logits.float()
    counted = targets != ignore_index
    right = logits.gather(-1, targets.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    losses = (logits.logsumexp(-1) - right).where(counted, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()
