"""Which shard of the sequence this process has, inside gptkernels.parallel.context: what models ask, who may be without
torch's distributed engine and compiler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .shards import Shard


@dataclass
class State:
    """Of this process: a backward pass runs in threads of autograd's own, which have to see the same."""

    shard: Shard | None = None


_state = State()


def current() -> Shard | None:
    """The shard that this process has inside a context; None outside"""
    return _state.shard


def refuse(what: str, why: str) -> None:
    """ValueError inside a context"""
    if _state.shard is not None:
        raise ValueError(f"{what} must be outside of gptkernels.parallel.context: {why}")


def become(shard: Shard | None) -> Shard | None:
    """-> what it was before"""
    before, _state.shard = _state.shard, shard
    return before
