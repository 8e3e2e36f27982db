"""What a call travels as from its op to the kernels: one record of tensors and options."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeVar

import torch


@dataclass(slots=True, eq=False)
class Record:
    """The fields of a subclass are the parameters that torch.library and autograd, which take no records, get one by
    one. The first one is a tensor."""

    # What the call has in common with those like it (remembered.likeness), where that was asked: the key under which
    # what was decided for it is kept. All that follows from what the caller passed is the same for them.
    key: tuple | None = field(default=None, init=False)

    @property
    def first(self) -> torch.Tensor:
        return getattr(self, self.__slots__[0])

    def flat(self) -> tuple:
        """The fields' values, of which `type(self)(*values)` makes a record again"""
        if torch.compiler.is_compiling():
            return tuple([getattr(self, name) for name in self.__slots__])
        return fields_of(type(self))(self)  # type: ignore[arg-type]

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        """-> what is the same, beside the dtype, and sizes that differ little in calls that are tuned together"""
        raise NotImplementedError


@functools.cache
def fields_of(kind: type[Record]) -> Callable[[Record], tuple]:
    return attrgetter(*kind.__slots__)


R = TypeVar("R", bound=Record)


def with_key(record: R, key: tuple | None) -> R:
    record.key = key
    return record
