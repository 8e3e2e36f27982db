"""The token embedding and the loss over a vocabulary that the ranks have between them: each has some rows of the
weight, and so some columns of the logits, which are whole nowhere."""

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import Call, checked, select
from ..ops.linear_cross_entropy import chunks, eager
from ..ops.linear_cross_entropy.chunks import Chunk, Options
from ..ops.linear_cross_entropy.record import LossCall
from .tensor_collectives import GatherColumns, Ranks, bounds, shared

NO_TARGET = -100


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

    def run(self, call: Call[Any]) -> Any:
        """call: of linear_cross_entropy or linear_log_probs. x: (..., d), targets: (...), the same on every rank;
        weight: (V of this rank, d), bias: (V of this rank,); no class_weight. -> the loss, on every rank, as x's
        gradient is"""
        record = checked(call)
        return call.run(Kernels(self, select(call, record)), record)  # type: ignore[arg-type]

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

    def complete(self, grads) -> tuple[Tensor, ...]:
        """x's gradient is the sum over the vocabulary, the others are of this part's own rows."""
        grad_x, *others = grads
        if grad_x.numel():
            dist.all_reduce(grad_x, group=self.ranks.group)
        return grad_x, *others


class Kernels:
    """A backend's loss of a part of the vocabulary, in the place of a backend"""

    def __init__(self, part: Vocabulary, backend: Any):
        chunk_loss = functools.partial(eager.chunk_loss, part=part)
        if backend is not eager:
            chunk_loss = functools.partial(chunk_loss_of_part, part, backend.chunk_loss)
        self.part, (self.fwd, self.bwd) = part, chunks.computations(chunk_loss, part)

    def linear_cross_entropy_fwd(self, call: LossCall, *needs: bool) -> tuple[Tensor, ...]:
        loss, z, lse, *grads = self.fwd(call, *needs)
        return loss, z, lse, *self.part.complete(grads)

    def linear_cross_entropy_bwd(self, call: LossCall, *arguments) -> tuple[Tensor, ...]:
        return self.part.complete(self.bwd(call, *arguments))


def chunk_loss_of_part(part: Vocabulary, kernel: chunks.ChunkLoss, chunk: Chunk, options: Options) -> None:
    """See chunks.Chunk and Options. kernel: that of a whole vocabulary. It gives the part's own log-sum-exp, and then
    the gradient of that, which counts for exp(own - all) of what the whole one's does; the target's column is put right
    after it."""
    if options.label_smoothing:
        return eager.chunk_loss(chunk, options, part)
    logits, targets, losses, lse, scale = chunk
    counted, valid = targets != options.ignore_index, (targets >= 0) & (targets < part.whole)
    here, column = part.own(targets, logits.shape[1])
    here, place = here.squeeze(1), column.unsqueeze(1)
    # Every row has a target among the columns, but for those that are ignored.
    column = column.where(counted, NO_TARGET)
    alone = options._replace(ignore_index=NO_TARGET, factors=None, with_grad=False)
    bias = None if options.bias is None else options.bias[place]
    score, slope = eager.scores_of(logits.gather(1, place), options._replace(bias=bias))
    score = score.squeeze(1)
    own = torch.empty_like(lse)
    kernel(Chunk(logits, column, losses, own, scale), alone)
    peak = part.highest(own.clone())
    peak.masked_fill_(peak.isinf(), 0)
    total, right = part.summed((own - peak).exp(), score.masked_fill(~here, 0))
    torch.add(peak, total.log(), out=lse)
    torch.sub(lse, right, out=losses)
    losses.masked_fill_(~valid, torch.nan).masked_fill_(~counted, 0)
    if not options.with_grad:
        return
    of_row = scale.expand(targets.shape).masked_fill(~valid, torch.nan).masked_fill(~counted, 0)
    of_all = of_row if options.factors is None else of_row * (1 + 2 * options.factors[1] * lse)
    kernel(
        Chunk(logits, column, torch.empty_like(losses), own, of_all * (own - lse).exp()), alone._replace(with_grad=True)
    )
    if bias is not None:  # which can make nothing of all columns: then 0 times what the kernel has from inf - inf
        logits.masked_fill_((own == -torch.inf).unsqueeze(1), 0)
    grad = of_all * (score - lse).exp() - of_row * here
    grad = (grad / options.temperature).unsqueeze(1)
    grad = grad if slope is None else grad * slope
    logits.scatter_(1, place, grad.masked_fill(~counted.unsqueeze(1), 0).to(logits.dtype))


def logits(part: Vocabulary, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x: (..., d), the same on every rank, weight: (V of this rank, d) -> (..., V) on every rank"""
    own = F.linear(shared(part.ranks, x), weight, bias)
    return GatherColumns.apply(part.ranks, own, part.whole)


def embedded(part: Vocabulary, tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens: (B, T), weight: (V of this rank, E) -> (B, T, E), whose sum over the ranks is the embedding"""
    here, row = part.own(tokens, weight.shape[0])
    return F.embedding(row, weight) * here
