"""What is known of a module that computes on our kernels: its family, what it was asked to do, what it was before."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn

# A module of somebody else's: what it has, only its family knows.
Foreign: TypeAlias = Any

SETTINGS = "_gptkernels"
FAMILIES: dict[str, "Family"] = {}


@dataclass(frozen=True)
class Settings:
    """What a replaced module was asked to do."""

    window: int | None = None
    backend: str = "auto"
    shard: Any = None  # a gptkernels.parallel.shards.Shard, where the model's input is one


@dataclass(frozen=True)
class Family:
    """One kind of module, and the methods that replace its own. gptkernels.swap.family() makes one."""

    name: str
    part: str
    matches: Callable[[nn.Module], bool | str]
    methods: dict[str, Callable | property] = field(default_factory=dict)
    probed: bool = False  # recognised by its looks only: what it computes is compared before it is replaced


def settings_of(module: nn.Module) -> Settings:
    return module.__dict__.get(SETTINGS, Settings())


def is_replaced(module: nn.Module) -> bool:
    return hasattr(type(module), "gptkernels_original")


def original(module: Foreign, name: str) -> Callable:
    """The method as it was, bound to the module."""
    return functools.partial(getattr(type(module).gptkernels_original, name), module)
