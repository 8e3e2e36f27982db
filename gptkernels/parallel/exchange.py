"""Keys and values on the wire: from the ranks that have them to those whose queries see them, and their gradients back.

`Blocks` are keys and values (or gradients) of spans of the sequence, wherever they came from: calls read the keys that
they need from them, and add gradients to theirs.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Plan, Span
from .shards import Shard

Spans = tuple[Span, ...]


def length(spans: Spans) -> int:
    return sum(stop - start for start, stop in spans)


class Block(NamedTuple):
    """k, v: (B, Hkv, stop - start, D) or packed (stop - start, Hkv, D)"""

    span: Span
    k: Tensor
    v: Tensor


class Blocks:
    """Of one sequence, whose tokens are dimension `dim`"""

    def __init__(self, dim: int):
        self.dim = dim
        self.blocks: list[Block] = []

    def add(self, spans: Spans, k: Tensor, v: Tensor) -> None:
        """k, v: of the spans, one behind the other"""
        at = 0
        for span in spans:
            n = span[1] - span[0]
            self.blocks.append(Block(span, k.narrow(self.dim, at, n), v.narrow(self.dim, at, n)))
            at += n
        self.blocks.sort(key=lambda block: block.span)

    def pieces(self, span: Span) -> list[tuple[Tensor, Tensor, int]]:
        """-> of every block that has some of it: k, v, and where in the span they start"""
        found = []
        for (a, b), k, v in self.blocks:
            start, stop = max(a, span[0]), min(b, span[1])
            if start < stop:
                place = (self.dim, start - a, stop - start)
                found.append((k.narrow(*place), v.narrow(*place), start - span[0]))
        return found

    def read(self, span: Span) -> tuple[Tensor, Tensor]:
        """A view where one block has all of it"""
        found = self.pieces(span)
        if len(found) == 1:
            return found[0][:2]
        return torch.cat([k for k, _, _ in found], self.dim), torch.cat([v for _, v, _ in found], self.dim)

    def accumulate(self, span: Span, dk: Tensor, dv: Tensor) -> None:
        for k, v, at in self.pieces(span):
            n = k.shape[self.dim]
            k += dk.narrow(self.dim, at, n)
            v += dv.narrow(self.dim, at, n)


def zeros(spans: Spans, like: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """-> float32 sums of gradients, of dk and dv, of the spans' tokens"""
    shape = list(like.shape)
    shape[dim] = length(spans)
    made = like.new_zeros((2, *shape), dtype=torch.float32)
    return made[0], made[1]


class Messages:
    """Keys and values (or gradients) under way: one message for each rank that has some for us, or we for it, k and v
    in it one behind the other."""

    def __init__(self, shard: Shard, dim: int, like: Tensor):
        """like: k"""
        self.shard, self.dim, self.like = shard, dim, like
        self.works: list[Any] = []
        self.arrived: list[tuple[Spans, Tensor]] = []
        self.sent: list[Tensor] = []

    def start(self, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Spans]]) -> None:
        """sends: rank, (2, ...) of k and v"""
        operations = []
        for rank, message in sends:
            self.sent.append(message)
            operations.append(dist.P2POp(dist.isend, message, group=self.shard.group, group_peer=rank))
        for rank, spans in receives:
            shape = list(self.like.shape)
            shape[self.dim] = length(spans)
            message = self.like.new_empty((2, *shape))
            self.arrived.append((spans, message))
            operations.append(dist.P2POp(dist.irecv, message, group=self.shard.group, group_peer=rank))
        if operations:
            with self.shard.talking():
                self.works = dist.batch_isend_irecv(operations)

    def finish(self) -> list[tuple[Spans, Tensor]]:
        """-> what has arrived: spans, (2, ...)"""
        with self.shard.talking():
            for work in self.works:
                work.wait()
        self.sent.clear()
        return self.arrived


def send_keys(shard: Shard, plan: Plan, own: Blocks, k: Tensor) -> Messages:
    """own: keys and values of this rank"""
    messages = Messages(shard, own.dim, k)
    sends = [(rank, packed(own, spans)) for rank, spans in plan.sends]
    messages.start(sends, list(plan.receives))
    return messages


def packed(blocks: Blocks, spans: Spans) -> Tensor:
    """-> (2, ...): k and v of the spans"""
    parts = [blocks.read(span) for span in spans]
    return torch.stack([torch.cat([part[i] for part in parts], blocks.dim) for i in (0, 1)])


def return_gradients(shard: Shard, plan: Plan, sums: Blocks, k: Tensor) -> Messages:
    """The other way: what we got has gradients for who gave it. They travel in k's dtype, in which they were computed.
    sums: float32"""
    messages = Messages(shard, sums.dim, k)
    sends = [(rank, packed(sums, spans).to(k.dtype)) for rank, spans in plan.receives]
    messages.start(sends, list(plan.sends))
    return messages
