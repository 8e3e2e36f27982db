"""All of a sequence on every rank, and what all ranks have for it, summed, on the rank that each part belongs to."""

import torch
import torch.distributed as dist
from torch import Tensor

from .shards import Shard

# Its name from torch 2.13 on, where the other one warns
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


def gathered(shard: Shard, x: Tensor, dim: int) -> Tensor:
    """x: this rank's part in `dim` -> the whole, in order"""
    x = x.contiguous()
    parts = x.new_empty((shard.size, *x.shape))
    with shard.talking():
        getattr(dist, ALL_GATHER)(parts.view(-1), x.view(-1), group=shard.group)
    return in_order(shard, parts, dim)


def in_order(shard: Shard, parts: Tensor, dim: int) -> Tensor:
    """parts: (ranks, ..., tokens of a shard, ...) -> (..., tokens of all, ...)"""
    if shard.layout.kind == "contiguous":
        return torch.cat(list(parts), dim)
    pieces: list[Tensor] = [parts] * shard.layout.pieces
    for rank in range(shard.size):
        numbers = shard.layout.numbers(rank)
        for number, piece in zip(numbers, parts[rank].chunk(len(numbers), dim), strict=True):
            pieces[number] = piece
    return torch.cat(pieces, dim)


def by_rank(shard: Shard, x: Tensor, dim: int) -> Tensor:
    """The other way: x: (..., tokens of all, ...) -> (ranks, ..., tokens of a shard, ...)"""
    pieces = x.chunk(shard.layout.pieces, dim)
    return torch.stack([torch.cat([pieces[n] for n in shard.layout.numbers(r)], dim) for r in range(shard.size)])


def summed(shard: Shard, x: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """x: (..., tokens of all, ...), what this rank adds to the whole -> its own part of the sum of all ranks', float32

    It travels as `dtype`, and is added up here in float32 and in the order of the ranks: a reduce-scatter would add in
    the dtype that travels."""
    parts = by_rank(shard, x, dim).to(dtype)
    received = torch.empty_like(parts)
    with shard.talking():
        dist.all_to_all_single(received, parts, group=shard.group)
    return received.sum(0, dtype=torch.promote_types(dtype, torch.float32))
