"""What tensor parallelism sends: sums over ranks, and rows that go from one rank to all and back.

Between the layers an activation is either whole on every rank, or its rows (all tokens of the batch, one after the
other) are cut between the ranks. R: ranks, M: rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..ops import dropout
from .gather import ALL_GATHER

all_gather = getattr(dist, ALL_GATHER)
# Its name from torch 2.13 on, and the one before
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Ranks:
    """The processes that cut a model between them. sequence: whether rows are cut between the layers where they can be,
    in training; `cut` says whether they are in this forward pass, which has tokens of `shape`."""

    def __init__(self, mesh: DeviceMesh, sequence: bool = True):
        self.mesh, self.sequence = mesh, sequence
        self.group = mesh.get_group()
        self.size, self.rank = mesh.size(), mesh.get_local_rank()
        self.cut, self.shape = False, (0, 0)

    def begin(self, shape: torch.Size) -> None:
        """A forward pass over tokens of this shape, (B, T)."""
        rows = shape.numel()
        self.shape = (shape[0], shape[1])
        self.cut = self.sequence and torch.is_grad_enabled() and rows > 0 and rows % self.size == 0

    def own(self, rows: Tensor) -> Tensor:
        """(M, ...) -> (M / R, ...)"""
        return rows.chunk(self.size)[self.rank]

    def enter(self, x: Tensor) -> Tensor:
        """What every rank reads with weights of its own: x: (B, T, C), or (M / R, C) of cut rows -> (B, T, C)"""
        return GatherRows.apply(self, x).view(*self.shape, -1) if self.cut else shared(self, x)

    def leave(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: (B, T, C) of each rank -> their sum and the bias, (B, T, C), or (M / R, C) of cut rows"""
        x = ReduceRows.apply(self, x.flatten(0, -2)) if self.cut else Reduce.apply(self, x)
        return x if bias is None else x + bias.to(x.dtype)

    def collect(self, x: Tensor) -> Tensor:
        """x: (M / R, C) of cut rows -> (B, T, C), for what every rank then computes alike"""
        return CollectRows.apply(self, x).view(*self.shape, -1) if self.cut else x

    @contextmanager
    def drawing(self, *, own: bool) -> Iterator[None]:
        """Inside, dropout masks are each rank's own, or the same on all of them."""

        def seed_of(seed: Tensor) -> Tensor:
            if own:
                return dropout.apart(seed, self.rank)
            dist.broadcast(seed, group=self.group, group_src=0)
            return seed

        with dropout.changing_seeds(seed_of):
            yield


def all_reduced(ranks: Ranks, x: Tensor) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=ranks.group)
    return x


def gathered(ranks: Ranks, x: Tensor) -> Tensor:
    """(M / R, ...) -> (M, ...)"""
    whole = x.new_empty((x.shape[0] * ranks.size, *x.shape[1:]))
    all_gather(whole, x.contiguous(), group=ranks.group)
    return whole


def scattered(ranks: Ranks, x: Tensor) -> Tensor:
    """(M, ...) of each rank -> (M / R, ...) of their sum"""
    own = x.new_empty((x.shape[0] // ranks.size, *x.shape[1:]))
    reduce_scatter(own, x.contiguous(), group=ranks.group)
    return own


class GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks, x):
        ctx.ranks = ranks
        return gathered(ranks, x)

    @staticmethod
    def backward(ctx, grad):
        return None, scattered(ctx.ranks, grad)


class ReduceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks, x):
        ctx.ranks = ranks
        return scattered(ranks, x)

    @staticmethod
    def backward(ctx, grad):
        return None, gathered(ctx.ranks, grad)


class CollectRows(GatherRows):
    """Where all ranks have the whole gradient"""

    @staticmethod
    def backward(ctx, grad):
        return None, ctx.ranks.own(grad).contiguous()


class Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ranks, x):
        return all_reduced(ranks, x)

    @staticmethod
    def backward(ctx, grad):
        return None, grad


class Share(torch.autograd.Function):
    """Passes tensors on; their gradients are summed over the ranks, in one message for each dtype."""

    @staticmethod
    def forward(ctx, ranks, *tensors):
        ctx.ranks = ranks
        return tuple(x.view_as(x) for x in tensors)

    @staticmethod
    def backward(ctx, *grads):
        sums: list[Tensor | None] = list(grads)
        for dtype in dict.fromkeys(grad.dtype for grad in grads if grad is not None):
            places = [i for i, grad in enumerate(grads) if grad is not None and grad.dtype == dtype]
            packed = torch.cat([grads[i].reshape(-1) for i in places])
            dist.all_reduce(packed, group=ctx.ranks.group)
            parts = packed.split([grads[i].numel() for i in places])
            for i, part in zip(places, parts, strict=True):
                sums[i] = part.view(grads[i].shape)
        return None, *sums


def shared(ranks: Ranks, x: Tensor) -> Tensor:
    return Share.apply(ranks, x)[0] if torch.is_grad_enabled() and x.requires_grad else x


class GatherColumns(torch.autograd.Function):
    """(..., this rank's columns) -> (..., width), where all ranks then have the whole gradient. Every rank but the last
    ones has ceil(width / R) columns."""

    @staticmethod
    def forward(ctx, ranks, x, width):
        ctx.ranks = ranks
        most = -(-width // ranks.size)
        padded = x.new_zeros((most, *x.shape[:-1]))
        padded[: x.shape[-1]] = x.movedim(-1, 0)
        return gathered(ranks, padded)[:width].movedim(0, -1).contiguous()

    @staticmethod
    def backward(ctx, grad):
        return None, grad.tensor_split(bounds(grad.shape[-1], ctx.ranks.size), -1)[ctx.ranks.rank], None


class Once(torch.autograd.Function):
    """Nothing, of what another rank adds to the sum; each of them has its gradient."""

    @staticmethod
    def forward(ctx, x):
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def bounds(size: int, ranks: int) -> list[int]:
    """Where the parts of all but the first rank begin, as DTensor cuts a dimension"""
    most = -(-size // ranks)
    return [min(most * rank, size) for rank in range(1, ranks)]
