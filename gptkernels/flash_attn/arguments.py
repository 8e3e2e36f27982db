"""What flash-attn's arguments are to gptkernels' attention."""

from typing import Any

from torch import Tensor

from ..ops import checks

Window = tuple[int, int]
ALL: Window = (-1, -1)


def options_of(dropout, scale, causal, window, softcap, slopes, deterministic) -> dict[str, Any]:
    """As gptkernels.attention has them"""
    checks.check_number("softcap", softcap)
    if len(window) != 2:
        raise ValueError(f"window_size must be (left, right), not {window}")
    left, right = (None if side < 0 else int(side) for side in window)
    return {
        "dropout": dropout,
        "scale": scale,
        "causal": causal,
        "window": None if left is None and (causal or right is None) else (left, 0 if causal else right),
        "softcap": softcap if softcap > 0 else None,
        "alibi_slopes": slopes,
        "deterministic": deterministic,
    }


def heads_first(name: str, x: Tensor, ndim: int) -> Tensor:
    """(B, T, H, D) -> (B, H, T, D)"""
    checks.check_tensor(name, x, ndim=ndim)
    return x.transpose(1, 2)


def unpacked(name: str, x: Tensor, ndim: int, parts: int) -> tuple[Tensor, ...]:
    """x: (..., parts, H, D) -> parts of (..., H, D)"""
    checks.check_tensor(name, x, ndim=ndim)
    if x.shape[-3] != parts:
        raise ValueError(f"{name} must have {parts} in dimension {ndim - 3}, not shape {tuple(x.shape)}")
    return x.unbind(-3)
