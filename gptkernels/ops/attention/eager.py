"""Attention with PyTorch's own kernels, in blocks of queries that read only the keys they see: time and memory grow
with the band, not with the square. Every device and dtype, and the fallback.

Padding and packed documents become calls on slices, so lengths are read on the host: on CUDA this waits for the GPU.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...remembered import remembered
from ...torch_library import torch_op
from ...tuning import choices
from ..checks import check_bounds
from ..dropout import keep
from .outputs import bwd_outputs, fwd_outputs
from .record import AttentionCall
from .sinks import add_sinks, delta_of, sinks_grad
from .visibility import Side, visible_at

# On the CPU PyTorch fuses the softmax into the products, and hands back the log-sum-exp that backward needs.
fused_fwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
fused_bwd = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def unsupported(*_) -> str | None:
    return None


class Sequences(NamedTuple):
    """Sequences of one length: rows of a batch, or one packed document, without the keys that are padding."""

    batch: slice  # rows, or the document
    queries: slice
    keys: slice
    packed: bool

    def select(self, x: Tensor, tokens: slice) -> Tensor:
        """x: (B, H, T, D) or packed (T, H, D) -> (B', H, T', D)"""
        return x[tokens].transpose(0, 1).unsqueeze(0) if self.packed else x[self.batch, :, tokens]

    def select_lse(self, lse: Tensor) -> Tensor:
        """lse: (B, H, Tq) or packed (H, T) -> (B', H, Tq')"""
        return lse[:, self.queries].unsqueeze(0) if self.packed else lse[self.batch]

    def dropout_row(self, lse: Tensor, rows: int | Tensor) -> Tensor:
        """lse: (B, H, Tq) or packed (H, T), rows: of a head -> (B', H, 1, 1): that of each head's first query here"""
        heads = lse.shape[:-1].numel()
        row = torch.arange(heads, device=lse.device) * rows + self.queries.start
        return row.view(1, -1, 1, 1) if self.packed else row.view(*lse.shape[:2], 1, 1)[self.batch]


def sequences(call: AttentionCall) -> Iterator[Sequences]:
    q, k = call.q, call.k
    if call.cu_seqlens is not None:
        # Looked at here too: under torch.compile the op could not.
        bounds = key_bounds = check_bounds(call.cu_seqlens, q.shape[0])
        if call.cu_seqlens_k is not None:
            key_bounds = check_bounds(call.cu_seqlens_k, k.shape[0], "cu_seqlens_k", "k")
        for n in range(len(bounds) - 1):
            yield Sequences(slice(n, n + 1), slice(*bounds[n : n + 2]), slice(*key_bounds[n : n + 2]), True)
    elif call.key_start is not None:
        for b, start in enumerate(call.key_start.clamp(0, k.shape[2]).tolist()):
            yield Sequences(slice(b, b + 1), slice(0, q.shape[2]), slice(start, k.shape[2]), False)
    else:
        yield Sequences(slice(0, q.shape[0]), slice(0, q.shape[2]), slice(0, k.shape[2]), False)


class Block(NamedTuple):
    """Queries of a sequence and the range of keys they see; `offset`: the first query's position less the first key."""

    queries: slice
    keys: slice
    offset: int
    left: Side
    right: Side

    def seen(self, device: torch.device) -> Tensor | None:
        """(queries, keys) bool, or None where every query sees every key"""
        m, n = self.queries.stop - self.queries.start, self.keys.stop - self.keys.start
        return _seen(m, n, self.offset, self.left, self.right, device)

    def distance(self, device: torch.device) -> Tensor:
        """(queries, keys) float32: from a query's position to a key"""
        m, n = self.queries.stop - self.queries.start, self.keys.stop - self.keys.start
        return (
            (torch.arange(m, device=device).unsqueeze(1) + self.offset - torch.arange(n, device=device)).abs().float()
        )


@lru_cache(maxsize=4)
def _seen(m: int, n: int, offset: int, left: Side, right: Side, device: torch.device) -> Tensor | None:
    position = torch.arange(m, device=device).unsqueeze(1) + offset
    seen = visible_at(position, torch.arange(n, device=device), False, (left, right))
    return None if seen.all() else seen


def blocks(queries: int, keys: int, left: Side, right: Side, rows: int = 0) -> Iterator[Block]:
    """Queries that see no key are in no block. rows: of a block, 0: as usual"""
    if not queries or not keys:
        return
    offset = keys - queries
    if left is None and right is None:
        yield Block(slice(0, queries), slice(0, keys), offset, left, right)
        return
    ahead = queries if right is None else right
    rows = rows or (256 if left is None or right is None else min(256, max(64, (max(left, right) + 1) // 4)))
    for start in range(max(0, -offset - ahead), queries, rows):
        stop = min(start + rows, queries)
        first = 0 if left is None else max(0, start + offset - left)
        last = min(keys, stop + offset + ahead)
        yield Block(slice(start, stop), slice(first, last), start + offset - first, left, right)


class Terms(NamedTuple):
    """What becomes of the scores of a block."""

    seen: Tensor | None  # (M, N) bool; None: everything
    scale: float
    keep: Tensor | None = None  # (B, H, M, N): 1 / (1 - dropout) or 0; None: no dropout
    softcap: float | None = None
    bias: Tensor | None = None  # (B or 1, H, M, N) float32, what is taken off for the distance

    def fused(self, q: Tensor) -> bool:
        """Whether PyTorch's kernel takes them"""
        return q.device.type == "cpu" and self.softcap is None and self.bias is None and self.keep is None


def terms_of(call: AttentionCall, part: Sequences, block: Block, lse: Tensor) -> Terms:
    """lse: (B, H, Tq) or (H, T)"""
    bias = keep = None
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes if call.alibi_slopes.ndim == 1 else call.alibi_slopes[part.batch]
        bias = slopes.view(-1, call.q.shape[1], 1, 1) * block.distance(call.q.device)
    if call.seed is not None:
        keep = kept(call.seed, part, block, lse, call.dropout)
    return Terms(block.seen(call.q.device), call.scale, keep, call.softcap, bias)


@torch_op(fake=fwd_outputs)
def attention_fwd(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """-> out: as q, lse: (B, H, Tq) or (H, T)"""
    out, lse = without_sinks(call)
    if call.sinks is not None:
        add_sinks(out, lse, call.sinks)
    return out, lse


def without_sinks(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """As attention_fwd"""
    out, lse = fwd_outputs(call)
    q, k, v, scale = call.q, call.k, call.v, call.scale
    if call.key_start is None and call.cu_seqlens is None and whole(call, q, k):
        out_whole, lse_whole, bad = fused_or_bad(q, k, v, None, True, scale)
        if bad is None:
            return laid_out(out_whole, out), laid_out(lse_whole, lse)
    out.zero_(), lse.fill_(-torch.inf)
    rows = block_rows(call)
    for part in sequences(call):
        q_part, out_part = part.select(q, part.queries), part.select(out, part.queries)
        k_part, v_part = part.select(k, part.keys), part.select(v, part.keys)
        lse_part = part.select_lse(lse)
        bad = None
        if whole(call, q_part, k_part):
            out_whole, lse_whole, bad = fused_or_bad(q_part, k_part, v_part, None, True, scale)
            if bad is None:
                out_part.copy_(out_whole), lse_part.copy_(lse_whole)
                continue
        for block in blocks(q_part.shape[2], k_part.shape[2], call.left, call.right, rows):
            qb, kb, vb = q_part[:, :, block.queries], k_part[:, :, block.keys], v_part[:, :, block.keys]
            out_block, lse_block = block_fwd(qb, kb, vb, terms_of(call, part, block, lse))
            out_part[:, :, block.queries], lse_part[:, :, block.queries] = out_block, lse_block
        if bad is not None:
            before = (bad.cumsum(-1) == 0).repeat_interleave(q_part.shape[1] // k_part.shape[1], 1)
            out_part.copy_(torch.where(before.unsqueeze(-1), out_whole, out_part))
            lse_part.copy_(torch.where(before, lse_whole, lse_part))
    return out, lse


@torch_op(fake=bwd_outputs)
def attention_bwd(
    call: AttentionCall, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dout, out: as q, lse, dlse: (B, H, Tq) or (H, T) -> gradients of q, k, v, sinks"""
    *grads, dsinks = bwd_outputs(call, dout, out, lse, dlse)
    q, k, v, scale = call.q, call.k, call.v, call.scale
    if call.sinks is not None and dsinks is not None:
        dsinks.copy_(sinks_grad(call.sinks, lse, delta_of(dout, out, dlse)))
    if call.key_start is None and call.cu_seqlens is None and whole(call, q, k):
        sums = fused_grads(dout, dlse, q, k, v, out, lse, None, True, scale)
        dq, dk, dv = (laid_out(found, grad) for found, grad in zip(sums, grads, strict=True))
        return dq, dk, dv, dsinks
    dq, dk, dv = (grad.zero_() for grad in grads)
    rows = block_rows(call)
    for part in sequences(call):
        q_part, out_part, dout_part, dq_part = (part.select(x, part.queries) for x in (q, out, dout, dq))
        k_part, v_part, dk_part, dv_part = (part.select(x, part.keys) for x in (k, v, dk, dv))
        lse_part, dlse_part = part.select_lse(lse), None if dlse is None else part.select_lse(dlse)
        if whole(call, q_part, k_part):
            sums = fused_grads(dout_part, dlse_part, q_part, k_part, v_part, out_part, lse_part, None, True, scale)
            for target, grad in zip((dq_part, dk_part, dv_part), sums, strict=True):
                target.copy_(grad)
            continue
        # Keys get a share from each block that sees them: summed in float32, rounded once.
        dk_sum, dv_sum = (torch.zeros_like(x, dtype=torch.float32) for x in (dk_part, dv_part))
        for block in blocks(q_part.shape[2], k_part.shape[2], call.left, call.right, rows):
            qb, ob, gb = (x[:, :, block.queries] for x in (q_part, out_part, dout_part))
            kb, vb = k_part[:, :, block.keys], v_part[:, :, block.keys]
            dlse_block = None if dlse_part is None else dlse_part[:, :, block.queries]
            terms = terms_of(call, part, block, lse)
            dq_block, dk_block, dv_block = block_bwd(
                gb, dlse_block, qb, kb, vb, ob, lse_part[:, :, block.queries], terms
            )
            dq_part[:, :, block.queries] = dq_block
            dk_sum[:, :, block.keys] += dk_block
            dv_sum[:, :, block.keys] += dv_block
        dk_part.copy_(dk_sum), dv_part.copy_(dv_sum)
    return dq, dk, dv, dsinks


@remembered
def block_rows(call: AttentionCall) -> int:
    """What was measured for calls like this one, or 0"""
    return choices.setting("eager_rows", "attention", call, 0)


def whole(call: AttentionCall, q_part: Tensor, k_part: Tensor) -> bool:
    """Whether the fused kernel's own causal mask, which starts at the first key, is the mask of the whole sequence."""
    square = q_part.shape[2] == k_part.shape[2] > 0
    plain = call.causal and call.left is None and not call.dropout and call.softcap is None
    return call.q.device.type == "cpu" and plain and call.alibi_slopes is None and square


def laid_out(found: Tensor, like: Tensor) -> Tensor:
    """As it is, where it has the layout and dtype of `like`, which else takes it"""
    return found if found.dtype == like.dtype and found.stride() == like.stride() else like.copy_(found)


def kept(seed: Tensor, part: Sequences, block: Block, lse: Tensor, dropout: float) -> Tensor:
    """-> (B', H, queries, keys): 1 / (1 - dropout) where dropout keeps a weight, else 0"""
    query = torch.arange(block.queries.start, block.queries.stop, device=lse.device).unsqueeze(1)
    key = part.keys.start + torch.arange(block.keys.start, block.keys.stop, device=lse.device)
    rows: int | Tensor = lse.shape[-1]
    if seed.shape[0] > 1:
        seed, rows, first_row, first_key = seed.split(1)
        query, key = query + first_row, key + first_key
    return keep(seed, part.dropout_row(lse, rows) + query, key, dropout) / (1 - dropout)


def grouped(x: Tensor, heads: int) -> Tensor:
    """x: (B, H, T, D) -> (B, heads, H / heads, T, D) float32"""
    return x.unflatten(1, (heads, -1)).float()


def scores_of(q: Tensor, k: Tensor, terms: Terms) -> tuple[Tensor, Tensor | None]:
    """q: (B, H, M, D), k: (B, Hkv, N, D) -> (B, Hkv, H / Hkv, M, N): the logarithm of what a key weighs, and with a
    softcap the derivative of that by the score"""
    scores = grouped(q, k.shape[1]) @ k.unsqueeze(2).float().mT * terms.scale
    slope = None
    if terms.softcap is not None:
        bent = (scores / terms.softcap).tanh()
        scores, slope = terms.softcap * bent, 1 - bent * bent
    if terms.bias is not None:
        scores = scores - terms.bias.unflatten(1, (k.shape[1], -1))
    return scores if terms.seen is None else scores.masked_fill(~terms.seen, -torch.inf), slope


def block_fwd(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """q: (B, H, M, D), k, v: (B, Hkv, N, D) -> out: (B, H, M, D), lse: (B, H, M)"""
    if not terms.fused(q):
        return block_exact(q, k, v, terms)
    seen = terms.seen
    out, lse, bad = fused_or_bad(q, k, v, seen, False, terms.scale)
    if bad is None:
        return out, lse
    # Where every query sees every key, nothing is spoiled that should not be, and bad is None.
    assert seen is not None
    reached = (seen & bad.unsqueeze(2)).any(-1).repeat_interleave(q.shape[1] // k.shape[1], 1)
    exact = block_exact(q, k, v, terms)
    return torch.where(reached.unsqueeze(-1), exact[0].to(out.dtype), out), torch.where(reached, exact[1], lse)


def fused_or_bad(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q: (B, H, M, D), k, v: (B, Hkv, N, D), seen: (M, N) -> out: (B, H, M, D), lse: (B, H, M), and None or the keys
    that are NaN or Inf: (B, Hkv, N) bool. Rows that see those are then wrong; the others are as if they were zeros.

    A weight of zero times NaN is NaN, so a key that is not finite spoils also rows that do not see it.
    """
    bias = bias_of(seen, q.dtype)
    out, lse = fused_fwd(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    if (seen is None and not causal) or out.sum(dtype=torch.float32).isfinite():
        return out, lse, None
    bad = ~(k.isfinite() & v.isfinite()).all(-1)
    k, v = (x.masked_fill(bad.unsqueeze(-1), 0) for x in (k, v))
    return *fused_fwd(q, k, v, 0.0, causal, attn_mask=bias, scale=scale), bad


def block_exact(q: Tensor, k: Tensor, v: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """As block_fwd, step by step in float32"""
    scores, _ = scores_of(q, k, terms)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp()
    if terms.keep is not None:
        weights = weights * terms.keep.unflatten(1, (k.shape[1], -1))
    return weigh(weights, v.unsqueeze(2).float(), terms.seen).flatten(1, 2), lse.flatten(1, 2)


def weigh(weights: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """weights: (..., M, N), v: (..., N, D), seen: (M, N) -> (..., M, D); NaN or Inf in v reach only who sees them"""
    out = weights @ v
    if seen is None or out.sum().isfinite():
        return out
    # A weight of zero times NaN is NaN: the finite part as a product, the keys with another part one by one.
    finite = v.masked_fill(~v.isfinite(), 0)
    out = weights @ finite
    for key in (~v.isfinite()).any(-1).flatten(0, -2).any(0).nonzero().flatten().tolist():
        part = weights[..., key : key + 1] * v[..., key : key + 1, :].masked_fill(finite[..., key : key + 1, :] != 0, 0)
        out += part.masked_fill(~seen[:, key : key + 1], 0)
    return out


@lru_cache(maxsize=4)
def bias_of(seen: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(M, N) bool -> what to add to scores"""
    if seen is None:
        return None
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, -torch.inf)


def block_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    terms: Terms,
) -> tuple[Tensor, Tensor, Tensor]:
    """dout, q, out: (B, H, M, D), k, v: (B, Hkv, N, D), lse, dlse: (B, H, M) -> dq, dk, dv"""
    if terms.fused(q):
        return fused_grads(dout, dlse, q, k, v, out, lse, terms.seen, False, terms.scale)
    heads = k.shape[1]
    delta, lse = (x.unflatten(1, (heads, -1)).unsqueeze(-1) for x in (delta_of(dout, out, dlse), lse))
    scores, slope = scores_of(q, k, terms)
    weights = (scores - lse).exp()
    dout, q, k, v = grouped(dout, heads), grouped(q, heads), k.unsqueeze(2).float(), v.unsqueeze(2).float()
    dweights = dout @ v.mT
    kept_weights = weights
    if terms.keep is not None:
        keep = terms.keep.unflatten(1, (heads, -1))
        kept_weights, dweights = weights * keep, dweights * keep
    dscores = weights * (dweights - delta) * terms.scale
    if slope is not None:
        dscores = dscores * slope
    return (dscores @ k).flatten(1, 2), (dscores.mT @ q).sum(2), (kept_weights.mT @ dout).sum(2)


def fused_grads(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seen: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As block_bwd, by PyTorch's kernel"""
    # That kernel sums over the heads of a group in the inputs' dtype, which is too coarse for half precision.
    dout, q, k, v, out = (x.float() for x in (dout, q, k, v, out))
    if dlse is not None:
        # It has no gradient of lse. One more dimension, in which every value is 1 and the output's gradient is that of
        # lse, adds the same to the gradient of each weight.
        dout, v = torch.cat((dout, dlse.unsqueeze(-1)), -1), F.pad(v, (0, 1), value=1.0)
        q, k, out = (F.pad(x, (0, 1)) for x in (q, k, out))
    bias = bias_of(seen, torch.float32)
    grads = fused_bwd(dout, q, k, v, out, lse.contiguous(), 0.0, causal, attn_mask=bias, scale=scale)
    return grads if dlse is None else tuple(grad[..., :-1] for grad in grads)
