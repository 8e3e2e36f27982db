"""The distillation loss, read aloud. Any dtype including float64; what tests and benchmarks compare with."""

import torch
from torch import Tensor


def linear_kl_div(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    targets: Tensor | None = None,
    *,
    vocabulary: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    temperature: float = 1.0,
) -> Tensor:
    """x: (..., d), weight: (V, d), teacher_x: (..., e), teacher_weight: (W, e), targets: (...) -> (), or (...)"""
    tokens = vocabulary or min(weight.shape[0], teacher_weight.shape[0])
    student, teacher = (log_probs(*each, tokens, temperature) for each in ((x, weight), (teacher_x, teacher_weight)))
    terms = teacher.exp() * (teacher - student)
    losses = terms.where(teacher > -torch.inf, 0).sum(-1)
    counted = torch.ones_like(losses, dtype=torch.bool) if targets is None else targets != ignore_index
    losses = losses.where(counted, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum()


def log_probs(x: Tensor, weight: Tensor, tokens: int, temperature: float) -> Tensor:
    """-> (..., tokens) float32 or float64"""
    logits = x @ weight[:tokens].mT
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return (logits / temperature).log_softmax(-1)
