"""What was decided for a call holds for every call like it.

Calls are alike when everything about them is the same but the values in their tensors: shapes, strides, dtypes,
devices, alignment, all other arguments, and the modes of torch that change what a call means.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter

from . import hardware
from .records import Record

# Of one memory: a training run has a dozen, generation over many lengths some more.
MOST_REMEMBERED = 4096
NUMBERS = (int, float, bool)

_memories: list["Memory"] = []


class Memory(dict[Any, Any]):
    """likeness(...) -> what was decided"""

    def __init__(self):
        _memories.append(self)

    def keep(self, key: tuple | None, decided: Any) -> None:
        if key is not None:
            if len(self) >= MOST_REMEMBERED:
                self.clear()
            self[key] = decided


F = TypeVar("F", bound=Callable)


def remembered(function: F) -> F:
    """For functions that decide by the likeness of their arguments alone, and hold on to none of them. Arguments by
    keyword are what follows from the others."""
    memory = Memory()

    @functools.wraps(function)
    def recall(*arguments, **following):
        key = likeness(arguments)
        decided = memory.get(key) if key is not None else None
        if decided is None:
            memory.keep(key, decided := function(*arguments, **following))
        return decided

    return cast(F, recall)


def forget() -> None:
    """For whoever changes what decisions rest on: launch tables, the order of backends, the library."""
    for memory in _memories:
        memory.clear()


def likeness(values: Iterable) -> tuple | None:
    """What a call with these arguments has in common with those like it, or None where that cannot be told."""
    key: list[Any] = [hardware.simulated_arch]
    append = key.append
    try:
        for value in values:
            kind = type(value)
            if kind is Tensor or kind is Parameter:
                append((value.shape, value.stride(), value.dtype, value.device, value.data_ptr() & 15))
            elif kind is str or value is None or kind is torch.dtype:
                append(value)
            elif kind in NUMBERS:
                append((kind, value))  # 1, 1.0 and True are equal, and not the same to a check
            elif isinstance(value, Record):
                append(value.key or likeness(value.flat()))
                if key[-1] is None:
                    return None
            elif kind is tuple:  # a pair of numbers
                append(likeness(value))
                if key[-1] is None:
                    return None
            else:
                return None
    except RuntimeError:  # a tensor without strides or an address
        return None
    if torch._C._is_any_autocast_enabled():
        key += [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    return tuple(key)
