"""A tensor's shard of the sequence, and the whole of it again."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import gather
from .shards import Shard, shard_of


def shard_sequence(x: Tensor, mesh, dim: int, layout: str = "contiguous") -> Tensor:
    """x: the whole, the same on every rank -> this rank's shard of dimension `dim`, whose size a mesh of P ranks has to
    divide (with layout="zigzag" 2 P)."""
    shard = shard_of(mesh, layout)
    check_dimension(x, dim)
    tokens = x.shape[dim]
    if tokens % shard.layout.pieces:
        raise ValueError(
            f"x must have a multiple of {shard.layout.pieces} tokens in dimension {dim} for {shard.size} ranks with "
            f"layout={layout!r}, not {tokens}"
        )
    spans = shard.spans(tokens // shard.size)
    found = [x.narrow(dim, start, stop - start) for start, stop in spans]
    return found[0] if len(found) == 1 else torch.cat(found, dim)


def gather_sequence(x: Tensor, mesh, dim: int, layout: str = "contiguous") -> Tensor:
    """x: this rank's shard -> the whole, on every rank. Its gradient is that of all ranks' losses together: each rank's
    share of it goes back to where x came from."""
    shard = shard_of(mesh, layout)
    check_dimension(x, dim)
    dim = dim % x.ndim
    if x.shape[dim] % (shard.layout.pieces // shard.size):
        raise ValueError(
            f"x must have an even number of tokens in dimension {dim} with layout='zigzag', not {tuple(x.shape)}"
        )
    return GatherSequence.apply(x, shard, dim)


def check_dimension(x: Tensor, dim: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, not {type(x).__name__}")
    if isinstance(dim, bool) or not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        raise ValueError(f"dim must be a dimension of x, which has {x.ndim}, not {dim!r}")


class GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, shard: Shard, dim: int) -> Tensor:
        ctx.shard, ctx.dim = shard, dim
        return gather.gathered(shard, x, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return gather.summed(ctx.shard, grad, ctx.dim, grad.dtype).to(grad.dtype), None, None
