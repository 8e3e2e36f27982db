"""LayerNorm, read aloud. Any dtype including float64; what tests and benchmarks compare with."""

from torch import Tensor

from ..dropout import dropped


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """x: (..., N), weight, bias: (N,) -> (..., N)"""
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().mean(-1, keepdim=True)
    y = (x - mean) / (variance + eps).sqrt() * weight
    y = y if bias is None else y + bias
    return y.to(x.dtype)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x, residual: (..., N), weight, bias: (N,), seed: (1,) int64 -> y: (..., N), x + residual: (..., N)"""
    h = dropped(x, seed, dropout) + residual
    return layer_norm(h, weight, bias, eps=eps).to(x.dtype), h
