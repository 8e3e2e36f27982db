"""Sinks, an unscaled extra column of the softmax without a value, added to what attention left without them."""

import torch
from torch import Tensor

from .outputs import bwd_outputs
from .record import AttentionCall


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """out: (B, H, Tq, D) or packed (T, H, D), lse: (B, H, Tq) or (H, T): changed in place"""
    sinks = sinks.float().unsqueeze(-1)
    share = (lse - sinks).sigmoid().masked_fill_(sinks == -torch.inf, 1.0)  # of the keys in the whole
    out.mul_(share.unsqueeze(-1) if out.ndim == 4 else share.mT.unsqueeze(-1))
    torch.logaddexp(lse, sinks, out=lse)


def delta_of(dout: Tensor, out: Tensor, dlse: Tensor | None) -> Tensor:
    """dout, out: (B, H, Tq, D) or packed (T, H, D) -> (B, H, Tq) or (H, T) float32: what the gradients of a row's
    weights add up to, each times its weight"""
    delta = (dout.float() * out.float()).sum(-1)
    delta = delta if out.ndim == 4 else delta.mT
    return delta if dlse is None else delta - dlse


def sinks_grad(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """lse: with the sinks, delta: (B, H, Tq) or packed (H, T) -> (H,) float32"""
    sinks = sinks.float().unsqueeze(-1)
    share = (sinks - lse).exp().masked_fill_(sinks == -torch.inf, 0.0)
    return -(share * delta).sum((0, 2) if lse.ndim == 3 else 1)


def without_pairs(call: AttentionCall, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None):
    """-> all gradients, of a call without queries or without keys"""
    *grads, dsinks = bwd_outputs(call, dout, out, lse, dlse)
    dq, dk, dv = (grad.zero_() for grad in grads if grad is not None)
    if call.sinks is not None and dsinks is not None:
        dsinks.copy_(sinks_grad(call.sinks, lse, delta_of(dout, out, dlse)))
    return dq, dk, dv, dsinks
