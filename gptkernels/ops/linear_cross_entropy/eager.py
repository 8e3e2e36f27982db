"""The chunked loss with PyTorch's own kernels: every device and dtype, and what the others are measured against."""

import torch
from torch import Tensor

from . import chunks
from .chunks import Chunk, Options, Part


def unsupported(*_) -> str | None:
    return None


def chunk_loss(chunk: Chunk, options: Options, part: Part | None = None) -> None:
    """See chunks.Chunk and Options. part: of the vocabulary, where logits and bias have no more"""
    logits, targets, losses, lse, scale = chunk
    scores, slope = scores_of(logits, options)
    first, whole = (0, logits.shape[1]) if part is None else (part.first, part.whole)
    counted = targets != options.ignore_index
    # Where a target is out of range the loss is NaN, and nothing outside of the row is read.
    valid = (targets >= 0) & (targets < whole)
    here = valid if part is None else (targets >= first) & (targets < first + logits.shape[1])
    index = (targets - first).where(here, 0).unsqueeze(1)
    right = scores.gather(1, index).squeeze(1)
    all_scores = weighted_sum(scores, options.class_weight) if options.label_smoothing else None
    peak = scores.amax(1)
    if part is not None:
        peak = part.highest(peak)
    # inf - inf would be NaN: of such rows the sum is taken as it is.
    peak.masked_fill_(peak.isinf(), 0)
    total = scores.sub_(peak.unsqueeze(1)).exp_().sum(1)
    if part is not None:
        own = () if all_scores is None else (all_scores,)
        total, right, *others = part.summed(total, right.masked_fill(~here, 0), *own)
        all_scores = others[0] if others else None
    torch.add(peak, total.log(), out=lse)
    torch.sub(lse, right, out=losses)
    of_target, smoothing = target_weight(index, options), options.label_smoothing
    if of_target is not None:
        losses.mul_(of_target)
    if all_scores is not None:
        assert options.factors is not None
        losses.add_(options.factors[0] * lse - all_scores / whole, alpha=smoothing)
    losses.masked_fill_(~valid, torch.nan).masked_fill_(~counted, 0)
    if not options.with_grad:
        return
    row_scale = scale.expand(targets.shape).masked_fill(~valid, torch.nan).masked_fill(~counted, 0)
    of_row = row_scale if of_target is None else row_scale * of_target
    of_all = of_row
    if options.factors is not None:
        of_all = of_row + row_scale * (smoothing * options.factors[0] + 2 * options.factors[1] * lse)
    grad = scores.mul_((of_all / total).unsqueeze(1))
    grad.scatter_add_(1, index, -(of_row if part is None else of_row.masked_fill(~here, 0)).unsqueeze(1))
    if smoothing:
        share = row_scale.unsqueeze(1) * (smoothing / whole)
        grad.sub_(share if options.class_weight is None else share * options.class_weight)
    if slope is not None:
        grad.mul_(slope)
    if options.temperature != 1:
        grad.div_(options.temperature)
    # 0 * NaN or Inf of an ignored row's logits is not 0. A GPU would have to be waited for to know that there is none.
    if not counted.is_cpu or not counted.all():
        grad.masked_fill_(~counted.unsqueeze(1), 0)
    if grad.data_ptr() != logits.data_ptr():
        logits.copy_(grad)


def scores_of(logits: Tensor, options: Options) -> tuple[Tensor, Tensor | None]:
    """logits: (R, V), overwritten where they are float32 -> scores: (R, V) float32, and with a softcap the factor that
    it brings into their gradient"""
    scores = logits.float()
    if options.bias is not None:
        scores.add_(options.bias)
    slope = None
    if options.softcap:
        scores.div_(options.softcap).tanh_()
        slope = 1 - scores.square() if options.with_grad else None
        scores.mul_(options.softcap)
    if options.temperature != 1:
        scores.div_(options.temperature)
    return scores, slope


def weighted_sum(scores: Tensor, class_weight: Tensor | None) -> Tensor:
    """scores: (R, V), class_weight: (V,) -> (R,)"""
    return scores.sum(1) if class_weight is None else scores @ class_weight


def target_weight(index: Tensor, options: Options) -> Tensor | None:
    """index: (R, 1) -> (1 - label_smoothing) w[target]: () or (R,), None for 1"""
    if options.class_weight is not None:
        return options.class_weight[index.squeeze(1)] * (1 - options.label_smoothing)
    return index.new_tensor(1 - options.label_smoothing, dtype=torch.float32) if options.label_smoothing else None


linear_cross_entropy_fwd, linear_cross_entropy_bwd = chunks.launchers(chunk_loss, __name__)
