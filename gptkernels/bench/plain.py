"""Each op as people write it first: a line or two of PyTorch, in the case's dtype."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.attention.visibility import positions, visible
from .cases import Case


def grouped(x: Tensor, case: Case) -> Tensor:
    """x: (B, G, T, D) -> (B, H, T, D)"""
    return x if case.shape["G"] == case.shape["H"] else x.repeat_interleave(case.shape["H"] // case.shape["G"], 1)


def mask_of(case: Case, device: torch.device, queries: int = 0) -> Tensor:
    """(queries, T) bool"""
    tokens = case.shape["T"]
    return visible(queries or tokens, tokens, True, case.kwargs["window"], device=device)


def plain(case: Case, device: torch.device) -> Callable:
    """Each op as a line or two of PyTorch"""

    if case.op in ("attention", "decode_attention"):
        return (plain_attention if case.op == "attention" else plain_decode)(case, device)
    plain: dict[str, Callable] = {
        "layer_norm": plain_layer_norm,
        "add_layer_norm": plain_add_layer_norm,
        "rms_norm": plain_rms_norm,
        "add_rms_norm": plain_add_rms_norm,
        "rope": plain_rope,
        "mlp": plain_mlp,
        "linear_cross_entropy": functools.partial(plain_loss, **case.kwargs),
        "linear_log_probs": plain_log_probs,
        "linear_kl_div": plain_kl_div,
        "gated_mlp": plain_gated_mlp,
    }
    return plain[case.op]


def plain_attention(case: Case, device: torch.device, queries: int = 0) -> Callable:
    hidden, cap = ~mask_of(case, device, queries), case.kwargs.get("softcap")
    if case.shape.get("A"):
        rows, tokens = hidden.shape
        distances = positions(rows, tokens, device) - torch.arange(tokens, device=device)

    def attention(q, k, v, sinks=None, alibi_slopes=None):
        k, v = grouped(k, case), grouped(v, case)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if cap is not None:
            scores = cap * (scores / cap).tanh()
        if alibi_slopes is not None:
            scores = scores - (alibi_slopes[:, None, None] * distances).to(scores.dtype)
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is None:
            return scores.softmax(-1) @ v
        column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ v

    return attention


def plain_decode(case: Case, device: torch.device) -> Callable:
    attention, tokens = plain_attention(case, device, queries=1), case.shape["T"]

    def decode(q, k_cache, v_cache, lengths, sinks=None, block_table=None):
        if block_table is not None:
            k_cache, v_cache = (x[block_table].transpose(1, 2).flatten(2, 3)[:, :, :tokens] for x in (k_cache, v_cache))
        return attention(q, k_cache, v_cache, sinks)

    return decode


def plain_layer_norm(x, weight, bias):
    return F.layer_norm(x, weight.shape, weight, bias)


def plain_add_layer_norm(x, residual, weight, bias):
    h = x + residual
    return F.layer_norm(h, weight.shape, weight, bias), h


def plain_rms_norm(x, weight):
    """As the models' own code has it"""
    wide = x.float()
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * normalised.to(x.dtype)


def plain_add_rms_norm(x, residual, weight):
    h = x + residual
    return plain_rms_norm(h, weight), h


def plain_rope(q, k, cos, sin):
    """As the models' own code has it"""

    def rotated(x):
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    return rotated(q), rotated(k)


def plain_mlp(x, fc_weight, fc_bias, proj_weight, proj_bias):
    return F.linear(F.gelu(F.linear(x, fc_weight, fc_bias), approximate="tanh"), proj_weight, proj_bias)


def plain_gated_mlp(x, gate_weight, up_weight, down_weight):
    return F.linear(F.silu(F.linear(x, gate_weight)) * F.linear(x, up_weight), down_weight)


def plain_loss(x, weight, targets, softcap=None):
    logits = F.linear(x, weight)
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits.float(), targets)


def plain_kl_div(x, weight, teacher_x, teacher_weight, targets):
    student, teacher = (F.linear(*each).float().log_softmax(-1) for each in ((x, weight), (teacher_x, teacher_weight)))
    losses = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return losses.where(targets != -100, 0)


def plain_log_probs(x, weight, targets):
    return F.linear(x, weight).float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
