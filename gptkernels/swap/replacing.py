"""A module takes our computation by changing its class: the parameters, buffers, hooks, names and wrappers around it
stay the very same objects, and changing the class back is the undo."""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn

from .modules import FAMILIES, SETTINGS, Foreign, Settings


def replace(module: nn.Module, families: tuple[str, ...], settings: Settings) -> None:
    """families: names of those whose methods the module takes."""
    cls: Any = type(module)
    module.__class__ = replaced_class(cls, families)
    module.__dict__[SETTINGS] = settings


def check_restorable(module: nn.Module) -> None:
    cls = type(module)
    if "gptkernels_original" not in vars(cls):
        raise RuntimeError(f"{cls.__name__} was given another class after it was replaced (by FSDP?): undo that first")


def restore(module: Foreign) -> None:
    check_restorable(module)
    module.__class__ = type(module).gptkernels_original
    del module.__dict__[SETTINGS]


@functools.cache
def replaced_class(cls: type, families: tuple[str, ...]) -> type:
    """A subclass with the methods of those families and everything else, its name included, as it was."""
    body = {
        "__reduce_ex__": reduce,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "gptkernels_original": cls,
        "gptkernels_families": families,
    }
    for family in families:
        for name, method in FAMILIES[family].methods.items():
            # Signatures are read: by Trainer to choose columns, by generate() to check its arguments.
            if isinstance(method, FunctionType):
                body[name] = functools.wraps(getattr(cls, name))(own_copy(method))
            else:
                body[name] = method
    return type(cls)(cls.__name__, (cls,), body)


def own_copy(method: Callable) -> Callable:
    """A function of its own for each class, for functools.wraps to write on."""

    def replacement(self, *args, **kwargs):
        return method(self, *args, **kwargs)

    return replacement


def reduce(module: Foreign, protocol) -> tuple:
    """For pickle and deepcopy, which could not find the subclass by its name."""
    cls = type(module)
    return rebuilt, (cls.gptkernels_original, cls.gptkernels_families), module.__dict__


def rebuilt(cls: type, families: tuple[str, ...]) -> nn.Module:
    if cls.__module__.startswith("transformers."):
        from . import attention_interface

        attention_interface.ensure_registered()
    new: Any = replaced_class(cls, families)
    return new.__new__(new)
