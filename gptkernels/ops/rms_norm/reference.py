"""RMSNorm, read aloud. Any dtype including float64; what tests and benchmarks compare with."""

import torch
from torch import Tensor

from ..dropout import dropped


def rms_norm(
    x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, offset: float = 0.0, cast: str = "llama"
) -> Tensor:
    """x: (..., N), weight: (N,) -> (..., N)"""
    wide = torch.promote_types(x.dtype, torch.float32)
    normalised = x.to(wide) / (x.to(wide).square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is None:
        return normalised.to(x.dtype)
    if cast == "llama":
        normalised = normalised.to(x.dtype)
    return (normalised * (weight.to(wide) + offset)).to(x.dtype)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast: str = "llama",
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x, residual: (..., N), weight: (N,), seed: (1,) int64 -> y: (..., N), x + residual: (..., N)"""
    h = dropped(x, seed, dropout) + residual
    return rms_norm(h, weight, eps=eps, offset=offset, cast=cast).to(x.dtype), h
