"""The loss of a language model, read aloud. Any dtype including float64; what tests and benchmarks compare with."""

import torch
from torch import Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    class_weight: Tensor | None = None,
    return_z_loss: bool = False,
):
    """x: (..., d), weight: (V, d), bias, class_weight: (V,), targets: (...) int64 -> (), or (...) for "none"; with
    return_z_loss also what z_loss adds to it"""
    logits = logits_of(x, weight, bias, softcap) / temperature
    counted = targets != ignore_index
    right = targets.where(counted, 0)
    counts_for = logits.new_ones(weight.shape[0]) if class_weight is None else class_weight.to(logits.dtype)
    lse = logits.logsumexp(-1)
    surprise = lse.unsqueeze(-1) - logits
    losses = counts_for[right] * surprise.gather(-1, right.unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses + label_smoothing * (counts_for * surprise).mean(-1)
    losses = losses.where(counted, 0)
    squares = (z_loss * lse.square()).where(counted, 0) if z_loss else torch.zeros_like(losses)
    if reduction == "sum":
        losses, squares = losses.sum(), squares.sum()
    elif reduction == "mean":
        losses = losses.sum() / counts_for[right].where(counted, 0).sum()
        squares = squares.sum() / counted.sum()
    return (losses + squares, squares) if return_z_loss else losses + squares


def linear_log_probs(
    x: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """x: (..., d), weight: (V, d), bias: (V,), targets: (...) int64 -> (...)"""
    logits = logits_of(x, weight, bias, None) / temperature
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def logits_of(x: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """-> (..., V) float32 or float64"""
    logits = x @ weight.mT
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        logits = logits + bias
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
