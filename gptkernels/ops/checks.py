"""Argument checks that ops share. Each message names the argument, what was got and what is accepted."""

import math
from numbers import Real

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def names(dtypes) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def check_tensor(name: str, value, *, dtypes=DTYPES, ndim: int | None = None, device=None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, not {value.layout}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {names(dtypes)}, not {names([value.dtype])}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimension{'s' * (ndim != 1)}, not shape {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, not on {value.device}")


def check_shape(name: str, value: Tensor, shape: tuple, meaning: str) -> None:
    """meaning: where `shape` comes from, such as "x's last dimension"."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)} ({meaning}), not {tuple(value.shape)}")


def check_number(
    name: str,
    number,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name} must be a number, not {type(number).__name__}")
    value = float(number)
    if not (value > above and value >= at_least and value < below and value <= at_most):
        bounds = [f"> {above}"] * (above > -math.inf) + [f">= {at_least}"] * (at_least > -math.inf)
        bounds += [f"< {below}"] * (below < math.inf) + [f"<= {at_most}"] * (at_most < math.inf)
        raise ValueError(f"{name} must be {' and '.join(bounds) or 'finite'}, not {value}")


def check_positive(name: str, number) -> None:
    """None, or positive and finite"""
    if number is not None:
        check_number(name, number, above=0, below=math.inf)


def check_flags(**flags) -> None:
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, not {flag!r}")


def check_bounds(cu_seqlens: Tensor, tokens: int, name: str = "cu_seqlens", of: str = "q") -> list[int]:
    """The bounds of packed documents, read from the device."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
        raise ValueError(f"{name} must rise from 0 to {tokens} ({of}'s tokens), not {bounds}")
    return bounds


def check_cache_lengths(lengths: Tensor, capacity: int, window: int | None) -> list[int]:
    """The tokens of each row of a cache of `capacity` slots so far, read from the device."""
    values = lengths.tolist()
    if min(values, default=0) < 0:
        raise ValueError(f"lengths must be at least 0, not {min(values)}")
    if max(values, default=0) > capacity and (window is None or window > capacity):
        raise ValueError(
            f"lengths must be at most the cache's {capacity} slots, not {max(values)}; more takes a window that the "
            "cache holds"
        )
    return values


def check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
