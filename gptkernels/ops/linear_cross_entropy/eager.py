"""The chunked loss with PyTorch's own kernels: every device and dtype, and what the others are measured against."""

import torch

from . import chunks


def unsupported(*_) -> str | None:
    return None


def chunk_loss(logits, targets, losses, lse, scale, ignore_index, with_grad) -> None:
    """See chunks.ChunkLoss."""
    scores = logits.float()  # the logits themselves where those are float32: what follows is in place
    counted = targets != ignore_index
    # Where a target is out of range the loss is NaN, and nothing outside of the row is read.
    valid = (targets >= 0) & (targets < logits.shape[1])
    index = targets.where(valid, 0).unsqueeze(1)
    right = scores.gather(1, index).squeeze(1)
    peak = scores.amax(1)
    # inf - inf would be NaN: of such rows the sum is taken as it is.
    peak.masked_fill_(peak.isinf(), 0)
    total = scores.sub_(peak.unsqueeze(1)).exp_().sum(1)
    torch.add(peak, total.log(), out=lse)
    torch.sub(lse, right, out=losses)
    losses.masked_fill_(~valid, torch.nan).masked_fill_(~counted, 0)
    if not with_grad:
        return
    row_scale = scale.expand(targets.shape).masked_fill(~valid, torch.nan).masked_fill(~counted, 0)
    probabilities = scores.mul_((row_scale / total).unsqueeze(1))
    probabilities.scatter_add_(1, index, -row_scale.unsqueeze(1))
    # 0 * NaN or Inf of an ignored row's logits is not 0. A GPU would have to be waited for to know that there is none.
    if not counted.is_cpu or not counted.all():
        probabilities.masked_fill_(~counted.unsqueeze(1), 0)
    if probabilities.data_ptr() != logits.data_ptr():
        logits.copy_(probabilities)


linear_cross_entropy_fwd, linear_cross_entropy_bwd = chunks.launchers(chunk_loss, __name__)
