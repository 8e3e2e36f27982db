"""The token embedding and the loss over a vocabulary that the ranks have between them: each has some rows of the
weight, and so some columns of the logits, which are whole nowhere."""

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Call, checked
from ..ops.linear_cross_entropy import chunks, eager
from ..ops.linear_cross_entropy.record import LossCall
from .tensor_collectives import GatherColumns, Ranks, bounds, shared


class Vocabulary:
    """This rank's part of `whole` tokens, and what makes the loss of it."""

    def __init__(self, ranks: Ranks, whole: int):
        edges = [0, *bounds(whole, ranks.size), whole]
        if edges[-1] == edges[-2]:
            raise ValueError(
                f"vocabulary must have rows for each of the {ranks.size} ranks, ceil(V / {ranks.size}) for all but the "
                f"last one, not {whole}"
            )
        self.ranks, self.whole, self.first = ranks, whole, edges[ranks.rank]
        chunk_loss = functools.partial(eager.chunk_loss, part=self)
        self.fwd, self.bwd = chunks.computations(chunk_loss, self)

    def run(self, call: Call[Any]) -> Any:
        """call: of linear_cross_entropy or linear_log_probs. x: (..., d), targets: (...), the same on every rank;
        weight: (V of this rank, d), bias: (V of this rank,); no class_weight. -> the loss, on every rank, as x's
        gradient is"""
        if call.backend not in ("auto", "eager"):
            raise ValueError(
                f'backend must be "auto" or "eager" where the vocabulary is cut between ranks, not {call.backend!r}'
            )
        return call.run(self, checked(call))  # type: ignore[arg-type]

    def own(self, tokens: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """tokens: (B, T), rows: of this rank -> (B, T, 1) bool, which are among them, (B, T) their rows, 0 of others"""
        here = (tokens >= self.first) & (tokens < self.first + rows)
        return here.unsqueeze(-1), (tokens - self.first).where(here, 0)

    def highest(self, peak: Tensor) -> Tensor:
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=self.ranks.group)
        return peak

    def summed(self, *sums: Tensor) -> tuple[Tensor, ...]:
        packed = torch.stack(sums)
        dist.all_reduce(packed, group=self.ranks.group)
        return packed.unbind()

    def linear_cross_entropy_fwd(self, call: LossCall, *needs: bool) -> tuple[Tensor, ...]:
        loss, z, lse, *grads = self.fwd(call, *needs)
        return loss, z, lse, *self.complete(grads)

    def linear_cross_entropy_bwd(self, call: LossCall, *arguments) -> tuple[Tensor, ...]:
        return self.complete(self.bwd(call, *arguments))

    def complete(self, grads) -> tuple[Tensor, ...]:
        """x's gradient is the sum over the vocabulary, the others are of this part's own rows."""
        grad_x, *others = grads
        if grad_x.numel():
            dist.all_reduce(grad_x, group=self.ranks.group)
        return grad_x, *others


def logits(part: Vocabulary, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (..., d), the same on every rank, weight: (V of this rank, d) -> (..., V) on every rank"""
    own = F.linear(shared(part.ranks, x), weight, bias)
    return GatherColumns.apply(part.ranks, own, part.whole)


def embedded(part: Vocabulary, tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens: (B, T), weight: (V of this rank, E) -> (B, T, E), whose sum over the ranks is the embedding"""
    here, row = part.own(tokens, weight.shape[0])
    return F.embedding(row, weight) * here
