"""Rotary position embedding, read aloud. Any dtype including float64; what tests and benchmarks compare with."""

import torch
from torch import Tensor

from ..rms_norm.reference import rms_norm


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast: str = "llama",
) -> tuple[Tensor, Tensor]:
    """q: (B, H, T, D), k: (B, Hkv, T, D), cos, sin: (T, W) or (B, T, W), q_norm, k_norm: (D,) -> q, k rotated, after
    RMSNorms of their heads where those have weights"""
    if q_norm is not None:
        q, k = (rms_norm(x, w, eps=eps, offset=offset, cast=cast) for x, w in ((q, q_norm), (k, k_norm)))
    size = cos.shape[-1] if rotary_dim is None else rotary_dim
    # One angle for each pair of dimensions, which the tables may give once or for either of them.
    of_pairs = [halves(t, interleaved) if t.shape[-1] == size else (t, t) for t in (cos, sin)]
    (cos_1, cos_2), (sin_1, sin_2) = [[t.to(q.dtype).unsqueeze(-3) for t in pair] for pair in of_pairs]

    def rotated(x: Tensor) -> Tensor:
        x_1, x_2 = halves(x[..., :size], interleaved)
        y_1, y_2 = x_1 * cos_1 - x_2 * sin_1, x_2 * cos_2 + x_1 * sin_2
        y = torch.stack((y_1, y_2), -1).flatten(-2) if interleaved else torch.cat((y_1, y_2), -1)
        return torch.cat((y, x[..., size:]), -1)

    return rotated(q), rotated(k)


def halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """(..., R) -> the first and second of each pair: (..., R / 2)"""
    middle = x.shape[-1] // 2
    return (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :middle], x[..., middle:])
