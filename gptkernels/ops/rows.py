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
    return contiguous_rows(rows)


def contiguous_rows(x: Tensor) -> Tensor:
    """(..., N) with a contiguous last dimension: x, or a copy"""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def memory_order(x: Tensor) -> tuple[int, ...]:
    """x: (..., N) -> its dimensions but the last, outermost in memory first"""
    dimensions = tuple(range(x.ndim - 1))
    if x.ndim == 2 or any(x.stride(d) == 0 for d in dimensions):  # of expanded ones there is no telling
        return dimensions
    strides = x.stride()
    return tuple(sorted(dimensions, key=lambda d: -strides[d]))


def as_row_groups(x: Tensor) -> Tensor:
    """(..., N) -> (M, N), or (G, R, N) where only the R rows of a group are evenly spaced, as heads of packed
    projections are; in x's memory order, with a contiguous last dimension: a view, or one copy."""
    if x.ndim == 2 or x.is_contiguous():
        return as_rows(x)
    ordered = contiguous_rows(x.permute(*memory_order(x), -1))
    sizes: list[int] = []
    outer_stride = 0
    for size, stride in zip(ordered.shape[:-1], ordered.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and outer_stride == size * stride:
            sizes[-1] *= size
        else:
            sizes.append(size)
        outer_stride = stride
    return ordered.view(*(sizes or (1,)), x.shape[-1]) if len(sizes) <= 2 else as_rows(ordered)


def shaped_in_order(rows: Tensor, x: Tensor) -> Tensor:
    """rows: (M, N) or (G, R, N), contiguous, made of as_row_groups(x) -> x's shape, in x's memory order"""
    if x.ndim == 2 or x.is_contiguous():
        return shaped(rows, x)
    order = memory_order(x)
    ordered = rows.view(*(x.shape[d] for d in order), x.shape[-1])
    return ordered.permute(*(order.index(d) for d in range(len(order))), -1)


def group_stride(x: Tensor) -> int:
    """x: (M, N) or (G, R, N)"""
    return x.stride(0) if x.ndim == 3 else 0


def zero_(grads: tuple[Tensor | None, ...]) -> None:
    """Of no rows"""
    for grad in grads:
        if grad is not None:
            grad.zero_()
