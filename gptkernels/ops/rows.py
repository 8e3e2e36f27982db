"""Tensors of rows, as the ops that work along the last dimension take them."""

from torch import Tensor

from . import checks


def check_rows(name: str, x: Tensor) -> None:
    """x: (..., N), N at least 1, of one of the dtypes that ops take"""
    checks.check_tensor(name, x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} must have a last dimension of at least 1, not shape {tuple(x.shape)}")


def shaped(rows: Tensor, x: Tensor) -> Tensor:
    """rows: (M, N) -> x's shape"""
    return rows if x.ndim == 2 else rows.view(x.shape)


def as_rows(x: Tensor) -> Tensor:
    """(..., N) -> (M, N) with a contiguous last dimension: a view where the layout allows it, else one copy."""
    if x.ndim == 2 and (x.stride(1) == 1 or x.shape[1] == 1):
        return x
    rows = x.reshape(x.numel() // x.shape[-1], x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
