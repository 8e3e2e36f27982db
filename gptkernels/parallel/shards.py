"""One process's shard of the sequence, and the checks of what says which."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..failures import is_lost_rank, lost_rank
from .layout import LAYOUTS, Layout, Span

METHODS = ("auto", "gather", "ring")


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of the processes that cut a sequence between them."""

    group: Any  # a ProcessGroup
    rank: int
    layout: Layout
    method: str = "auto"  # how dense attention gets its keys

    @property
    def size(self) -> int:
        return self.layout.size

    def spans(self, tokens: int) -> tuple[Span, ...]:
        """tokens: of the shard"""
        return self.layout.spans(self.rank, tokens)

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """-> (tokens,) int64, of the shard's tokens in the whole sequence"""
        spans = self.spans(tokens)
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in spans])

    def share_of_mean(self, total: Tensor, count: Tensor) -> Tensor:
        """total, count: () sums over this rank's tokens -> of what the mean over the ranks is that of all tokens, as
        gradients are averaged too"""
        return total * (self.size / self.total(count))

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Around what waits for other ranks: LostRankError where one of them is gone"""
        try:
            yield
        except RuntimeError as error:
            if is_lost_rank(error):
                raise lost_rank(error) from error
            raise

    @torch.compiler.disable
    def total(self, x: Tensor) -> Tensor:
        """x: the same shape on every rank, without a gradient -> its sum over them"""
        x = x.clone()
        with self.talking():
            dist.all_reduce(x, group=self.group)
        return x


def shard_of(mesh, layout: str, method: str = "auto") -> Shard:
    """mesh: a DeviceMesh of one dimension; its checks, and those of the other arguments"""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f'mesh must be a DeviceMesh of one dimension, such as mesh["cp"], not {type(mesh).__name__}')
    if mesh.ndim != 1:
        raise ValueError(f"mesh must be a DeviceMesh of one dimension, not {mesh.ndim}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, not {method!r}")
    return Shard(mesh.get_group(), mesh.get_local_rank(), Layout(mesh.size(), layout), method)


@functools.cache
def connect(group, device_type: str) -> None:
    """NCCL's first message between two ranks of a group makes connections between all of them, which have to be there:
    a first sum has everybody, where some have nothing to send."""
    if device_type == "cuda":
        dist.all_reduce(torch.zeros(1, device="cuda"), group=group)
