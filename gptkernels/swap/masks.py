"""Which keys each row may see, in a form that transformers carries around as if it were its own mask.

transformers makes one mask per forward pass and hands it to every layer, to checkpoints and to compiled graphs, and
takes whatever is a tensor of four dimensions as finished. So a mask is one: int32, of shape

    (rows, KINDS.index(kind) + 2, (window or 0) + 1, columns)

and what has to be known without reading memory (kind, window) is in its shape: the two middle dimensions are expanded
and cost nothing. What differs from row to row is in the columns; no column where nothing is hidden.

    kind        columns                  which keys a query may see, before the window
    causal      (), (start)              the last query is at the last key; keys before start are hidden
    prefill     (), (start)              the same, with only as many keys as there are queries; the rest is unused cache
    cache       (end), (end, start)      the same, with the last query at key end - 1; the rest is unused cache
    causal_any  (hidden, *order)         keys in this order, the first `hidden` of which nobody sees, then as causal
    documents   (*cu_seqlens)            packed documents, one after the other over all rows
    full        (), (start)              all keys from start on
    full_documents (*cu_seqlens)         packed documents, all keys of the query's own; padding is a document too
    full_any    (hidden, *order)         keys in this order, the first `hidden` of which nobody sees
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.attention import attention, decode_attention
from ..ops.attention.decode.op import MAX_TOKENS
from ..ops.attention.visibility import visible, visible_at

KINDS = ("causal", "prefill", "cache", "causal_any", "documents", "full", "full_any", "full_documents")


class Unrepresentable(NotImplementedError):
    """A mask that the kernels cannot apply; says why."""


class Mask(NamedTuple):
    """A mask, read."""

    kind: str
    window: int | None
    columns: Tensor  # (rows, columns) int32

    @property
    def causal(self) -> bool:
        return not self.kind.startswith("full")

    @property
    def packed(self) -> bool:
        return self.kind.endswith("documents")


def write(kind: str, window: int | None, columns: Tensor) -> Tensor:
    """columns: (rows, n)"""
    rows, n = columns.shape
    return columns.to(torch.int32).view(rows, 1, 1, n).expand(rows, KINDS.index(kind) + 2, (window or 0) + 1, n)


def read(mask: Tensor) -> Mask:
    return Mask(KINDS[mask.shape[1] - 2], mask.shape[2] - 1 or None, mask[:, 0, 0])


def is_ours(mask: Tensor) -> bool:
    """Masks of transformers' own are boolean or floating point."""
    return mask.ndim == 4 and mask.dtype == torch.int32 and 2 <= mask.shape[1] < len(KINDS) + 2


def nothing_hidden(causal: bool, window: int | None, device: torch.device) -> Tensor:
    return write("causal" if causal else "full", window, torch.empty((1, 0), dtype=torch.int32, device=device))


def causal_mask(
    queries: int, keys: int, end: int | Tensor, window: int | None, real: Tensor | None, device: torch.device
) -> Tensor:
    """The mask of queries of which the last one is at key end - 1. real: (B, keys) bool, False for padding."""
    first: tuple[Tensor, ...]
    if isinstance(end, int):
        if end == keys:
            kind, first = "causal", ()
        elif end == queries:
            kind, first = "prefill", ()
        else:
            kind, first = "cache", (torch.full((1, 1), end, device=device),)
    else:
        kind, first = "cache", (end.to(device).view(1, 1),)
    visible = None if real is None else real & (torch.arange(keys, device=device) < end)
    if visible is None:
        return write(kind, window, torch.cat(first, 1) if first else torch.empty((1, 0), device=device))
    start, contiguous = visible.int().argmax(1, keepdim=True), is_contiguous(visible)
    if torch.compiler.is_compiling():
        # Reading the mask would break the graph.
        torch._assert_async(contiguous.all(), "attention_mask: hidden keys between visible ones are not compiled")
    else:
        queries_real = visible[:, end - queries : end].all() if isinstance(end, int) else contiguous.all()
        used = torch.arange(keys, device=device) >= end
        # One wait for the GPU.
        simple, ordered, nothing = torch.stack([contiguous.all(), queries_real, (visible | used).all()]).tolist()
        if nothing:
            return causal_mask(queries, keys, end, window, None, device)
        if not simple:
            return causal_any_mask(visible, window, ordered)
    columns = [*(x.expand(len(start), 1) for x in first), start]
    return write(kind, window, torch.cat(columns, 1))


def causal_any_mask(visible: Tensor, window: int | None, queries_visible: bool) -> Tensor:
    if window is not None:
        raise Unrepresentable(
            "attention_mask hides keys between visible ones, and a sliding window counts hidden keys too"
        )
    if not queries_visible:
        raise Unrepresentable("attention_mask hides keys between visible ones, among the tokens of this very call")
    return write("causal_any", None, hidden_first(visible))


def full_mask(keys: int, window: int | None, real: Tensor | None, device: torch.device) -> Tensor:
    """Every query may see every key. real: (B, keys) bool, False for padding."""
    if real is None:
        return nothing_hidden(False, window, device)
    if not torch.compiler.is_compiling():
        start = real.int().argmax(1, keepdim=True)
        left = (real.sum(1, keepdim=True) + start == keys).all()
        nothing, left = torch.stack([real.all(), left]).tolist()
        if nothing:
            return nothing_hidden(False, window, device)
        if left:
            return write("full", window, start)
    if window is not None:
        return ranges_mask(real, window)
    return write("full_any", None, hidden_first(real))


def ranges_mask(real: Tensor, window: int) -> Tensor:
    """Of keys that are all queries too. real: (B, T) bool, in each row True for tokens that are next to each other"""
    contiguous = is_contiguous(real).all()
    if torch.compiler.is_compiling():
        torch._assert_async(contiguous, "attention_mask: hidden keys between visible ones are not compiled")
    elif not contiguous:
        raise Unrepresentable("attention_mask hides keys between visible ones, and a window counts hidden keys too")
    rows, tokens = real.shape
    start, first = real.int().argmax(1), torch.arange(rows, device=real.device) * tokens
    # Of each row three documents: what is before the real tokens, they, and what is after them.
    bounds = torch.stack((first, first + start, first + start + real.sum(1)), 1).flatten()
    return write("full_documents", window, torch.cat((bounds, bounds.new_full((1,), rows * tokens))).view(1, -1))


def document_mask(documents: Tensor, window: int | None) -> Tensor:
    """documents: (B, T), a number that changes where a document ends"""
    changes = documents.diff(dim=1, prepend=documents[:, :1] - 1).flatten() != 0
    starts = changes.nonzero().flatten()
    return write("documents", window, torch.cat([starts, starts.new_tensor([changes.numel()])]).view(1, -1))


def is_contiguous(visible: Tensor) -> Tensor:
    """visible: (B, keys) -> (B,): whether the visible keys are next to each other"""
    return (visible.int().diff(dim=1, prepend=torch.zeros_like(visible[:, :1], dtype=torch.int32)) == 1).sum(1) <= 1


def hidden_first(visible: Tensor) -> Tensor:
    """visible: (B, keys) -> (B, 1 + keys): how many keys are hidden, and an order that puts those first"""
    hidden = (~visible).sum(1, keepdim=True)
    return torch.cat([hidden, visible.int().argsort(dim=1, stable=True)], 1)


def visible_keys(mask: Mask, rows: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """The same mask as transformers' own functions take it: (rows, 1, queries, keys) bool, True for visible."""
    columns = mask.columns if mask.packed else mask.columns.to(device).expand(rows, -1)
    if mask.packed:
        document = torch.bucketize(torch.arange(rows * queries, device=device), columns[0].to(device), right=True)
        document = document.view(rows, 1, -1)
        seen = visible(queries, keys, mask.causal, mask.window, device=device) & (document.mT == document)
        return seen.unsqueeze(1)
    key = torch.arange(keys, device=device)
    if mask.kind.endswith("_any"):
        seen = visible(queries, keys, mask.causal, None, columns[:, 0], device)[:, 0]
        order = columns[:, None, 1:].long().expand(seen.shape)
        return torch.zeros_like(seen).scatter_(2, order, seen).unsqueeze(1)
    end, start = torch.full((rows, 1), queries if mask.kind == "prefill" else keys, device=device), columns
    if mask.kind == "cache":
        end, start = columns[:, :1], columns[:, 1:]
    start = start if start.numel() else torch.zeros((rows, 1), device=device, dtype=torch.int32)
    position = torch.arange(queries, device=device).unsqueeze(1) + (end[:1] - queries)
    return visible_at(position, key, mask.causal, mask.window, start.flatten())


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    *,
    scale: float | None,
    dropout: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    backend: str,
) -> Tensor:
    """q: (B, H, Tq, D), k, v: (B, Hkv, Tk, D) -> (B, H, Tq, D). What a padding query gives is finite, and no more."""
    window, columns = mask.window, mask.columns
    options: dict[str, Any] = {
        "causal": mask.causal,
        "window": window,
        "scale": scale,
        "dropout": dropout,
        "softcap": softcap,
        "sinks": sinks,
        "backend": backend,
    }
    if mask.packed:
        rows = [x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (q, k, v)]
        out = attention(*rows, cu_seqlens=columns.flatten(), **options)
        return out.view(q.shape[0], q.shape[2], q.shape[1], -1).transpose(1, 2)
    if mask.kind == "cache":
        end, start = columns[:, :1].expand(q.shape[0], 1), columns[:, 1:]
        if not start.numel() and takes_decode(q, k, v, window, dropout, sinks):
            options = {name: options[name] for name in ("window", "scale", "softcap", "sinks")}
            lengths = end.flatten().contiguous()
            return decode_attention(q, k, v, lengths, **options, backend=decode_backend(backend))
        # The used part of the cache is brought to its end.
        keys = k.shape[2]
        order = (torch.arange(keys, device=k.device) + end) % keys
        k, v = (KeysInOrder.apply(x, order) for x in (k, v))
        start = keys - end + (start if start.numel() else 0)
        return attention(q, k, v, key_start=start.flatten().int(), **options)
    if mask.kind == "prefill":
        k, v = (x[:, :, : q.shape[2]] for x in (k, v))
    elif mask.kind.endswith("_any"):
        k, v = (KeysInOrder.apply(x, columns[:, 1:].long()) for x in (k, v))
        columns = columns[:, :1]
    key_start = columns.flatten().contiguous() if columns.numel() else None
    return attention(q, k, v, key_start=key_start, **options)


def takes_decode(q: Tensor, k: Tensor, v: Tensor, window: int | None, dropout: float, sinks: Tensor | None) -> bool:
    """Whether decode_attention, which reads the cache where it is, takes this call."""
    tokens, capacity = q.shape[2], k.shape[2]
    differentiable = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks))
    if dropout or tokens > MAX_TOKENS or differentiable:
        return False
    return window is None or window > capacity or window + tokens - 1 <= capacity


def decode_backend(backend: str) -> str:
    """decode_attention has no CUDA C++ kernels; there Triton's are the fastest."""
    return "triton" if backend == "cuda" else backend


class KeysInOrder(torch.autograd.Function):
    """x: (B, H, T, D), order: (B, T), a permutation of each row's keys -> x with its keys in that order. The gradient
    goes back the same way: no atomics, the same bits on every run."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.gather(2, order[:, None, :, None].expand_as(x))

    @staticmethod
    def backward(ctx, grad: Tensor):
        (order,) = ctx.saved_tensors
        return grad.gather(2, order.argsort(1)[:, None, :, None].expand_as(grad)), None
