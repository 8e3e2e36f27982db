"""transformers' attention on our kernels: attn_implementation="gptkernels".

Imports transformers, so gptkernels itself imports this module only when it is asked to.
"""

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)
from transformers.utils.output_capturing import _active_collector

from . import cut_attention, masks
from .masks import Mask, Unrepresentable
from .modules import settings_of

NAME = "gptkernels"
# What changes the result and is no argument of gptkernels.attention, and whether SDPA could do it.
UNSUPPORTED = {
    "position_bias": ("a position bias", True),
    "head_mask": ("a head mask", False),
}

_fallback: str | None = None
# Why the fallback made a mask; layers that get it need no reason of their own.
_explained = WeakIdKeyDictionary()


def register(fallback: str | None = None) -> None:
    """Makes attn_implementation="gptkernels" known to transformers: the attention, and the masks it takes.

    fallback: what to do with a call that the kernels cannot run exactly, such as a 4-D mask of your own: None raises
        NotImplementedError with the reason; "sdpa" runs it with PyTorch's attention and warns once per reason.
    """
    global _fallback
    if fallback not in (None, "sdpa"):
        raise ValueError(f'fallback must be None or "sdpa", not {fallback!r}')
    _fallback = fallback
    warn_once.cache_clear()
    AttentionInterface.register(NAME, gptkernels_attention)
    AttentionMaskInterface.register(NAME, gptkernels_mask)


def ensure_registered() -> None:
    """Without touching what the user has registered it with."""
    if NAME not in AttentionInterface._global_mapping:
        register()


def gptkernels_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **others,
) -> Tensor:
    """One of gptkernels.swap.masks; with the fallback and a mask that those cannot tell, transformers' mask for SDPA.

    attention_mask: (B, tokens so far) bool, False for padding."""
    try:
        return exact_mask(q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, torch.device(device))
    except Unrepresentable as problem:
        fall_back(str(problem))
        options = {**others, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "device": device}
        mask = sdpa_mask(
            batch_size, q_length, kv_length, int(q_offset), kv_offset, mask_function, attention_mask, **options
        )
        if mask is None:
            raise
        _explained[mask] = str(problem)
        return mask


def exact_mask(
    queries: int,
    keys: int,
    q_offset: int | Tensor,
    kv_offset: int,
    mask_function: Callable,
    attention_mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    real = None
    if attention_mask is not None:
        # Keys after the mask's end are unused cache.
        real = nn.functional.pad(attention_mask, (0, max(0, keys + kv_offset - attention_mask.shape[1])))
        real = real[:, kv_offset : kv_offset + keys]
    if mask_function is causal_mask_function:
        causal, window, documents = True, None, None
    elif mask_function is bidirectional_mask_function:
        causal, window, documents = False, None, None
    else:
        causal, window, documents = recognised(mask_function)
    if documents is not None:
        if documents.shape[1] != queries or queries != keys or not causal:
            raise Unrepresentable("packed documents together with a cache")
        return masks.document_mask(documents, window)
    if not causal:
        return masks.full_mask(keys, window, real, device)
    if isinstance(q_offset, Tensor) and not torch.compiler.is_compiling():
        q_offset = int(q_offset)
    return masks.causal_mask(queries, keys, q_offset + queries - kv_offset, window, real, device)


@torch.compiler.disable
def recognised(mask_function: Callable) -> tuple[bool, int | None, Tensor | None]:
    """-> causal, window, documents, for the combinations of transformers' own mask functions that say no more."""
    causal, window, documents = False, None, None
    for part in parts_of(mask_function):
        own = part.__module__ == causal_mask_function.__module__
        kind, cells = part.__qualname__.partition(".")[0] if own else None, variables_of(part)
        if part is causal_mask_function:
            causal = True
        elif kind == "sliding_window_overlay":
            width = cells["sliding_window"] or None
            window = width if window is None or width is None else min(width, window)
        elif kind == "sliding_window_bidirectional_overlay":
            # Its distance is counted without the query itself.
            window = cells["sliding_window"] + 1
        elif kind == "packed_sequence_mask_function":
            documents = cells["packed_sequence_mask"]
        elif part is not bidirectional_mask_function:
            raise Unrepresentable(
                f"the attention pattern {part.__qualname__} of this model is not one the kernels have"
            )
    if window is not None and window < 1:
        raise Unrepresentable(f"a sliding window of {window}")
    if documents is not None and bool((documents[:, -1:] == documents).all()):
        documents = None
    return causal, window, documents


def parts_of(mask_function: Callable) -> list[Callable]:
    """What a combination of transformers' mask functions is made of."""
    if mask_function.__module__ == causal_mask_function.__module__:
        kind = mask_function.__qualname__.partition(".")[0]
        if kind == "and_masks":
            return [part for each in variables_of(mask_function)["mask_functions"] for part in parts_of(each)]
        if kind == "remap_positions_for_packed_sequence":
            # Positions count up within a document, so the distances between its tokens stay as they are.
            return parts_of(variables_of(mask_function)["mask_function"])
    return [mask_function]


def variables_of(function: Callable) -> dict:
    """What a function closes over."""
    cells = getattr(function, "__closure__", None) or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def gptkernels_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others,
) -> tuple[Tensor, None]:
    """query: (B, H, Tq, D), key, value: (B, Hkv, Tk, D), attention_mask: of gptkernels_mask, s_aux: (H,), attention
    sinks -> (B, Tq, H, D), None"""
    sliding_window = sliding_window or None  # 0 is how some configurations say that there is none
    try:
        mask = mask_of_call(module, query, key, attention_mask, sliding_window, is_causal, others)
    except Unrepresentable as problem:
        if softcap is not None or s_aux is not None:
            raise NotImplementedError(f"{problem}, with soft-capped scores or attention sinks") from problem
        is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        window = settings_of(module).window
        dense = dense_mask(query, key, attention_mask, sliding_window, window, is_causal, problem)
        fall_back(str(problem))
        others.pop("output_attentions", None)
        return sdpa_attention_forward(module, query, key, value, dense, dropout, scaling, is_causal=False, **others)
    settings = settings_of(module)
    sinks = s_aux if s_aux is None or s_aux.dtype == torch.float32 else s_aux.to(query.dtype)
    options: dict[str, Any] = {
        "scale": scaling,
        "dropout": dropout,
        "softcap": softcap,
        "sinks": sinks,
        "backend": settings.backend,
    }
    if cut_attention.is_cut(settings.shard):
        out = cut_attention.attend(settings.shard, query, key, value, mask, **options)
    else:
        out = masks.attend(query, key, value, mask, **options)
    return out.transpose(1, 2), None


def mask_of_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    is_causal: bool | None,
    others: dict,
) -> Mask:
    for name, (what, sdpa_can) in UNSUPPORTED.items():
        if others.get(name) is not None:
            if not sdpa_can:
                raise NotImplementedError(f'{what} ({name}): take attn_implementation="eager" for this model')
            raise Unrepresentable(f"{what} ({name})")
    if others.get("output_attentions") or records_attentions():
        raise Unrepresentable("output_attentions=True: the kernels never have the attention weights as a whole")
    is_causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    window = settings_of(module).window
    if attention_mask is None:
        if sliding_window is not None and not is_causal:
            raise Unrepresentable("a sliding window without a mask in an attention that is not causal")
        mask = no_mask(query, key, is_causal, sliding_window, others)
    elif masks.is_ours(attention_mask):
        mask = masks.read(attention_mask)
        if mask.causal and sliding_window is not None:
            if mask.window not in (None, sliding_window):
                raise Unrepresentable(
                    f"the mask has a sliding window of {mask.window} keys and the layer one of {sliding_window}"
                )
            mask = banded(mask, sliding_window)
    elif attention_mask in _explained:
        raise Unrepresentable(_explained[attention_mask])
    else:
        raise Unrepresentable(
            f"an attention_mask of shape {tuple(attention_mask.shape)} made by the caller: the kernels take padding "
            "(B, tokens), not a mask of scores"
        )
    return mask if window is None else banded(mask, min(window, mask.window or window))


def banded(mask: Mask, window: int) -> Mask:
    if mask.kind.endswith("_any"):
        raise Unrepresentable("attention_mask hides keys after visible ones, and the layer has a window")
    return mask._replace(window=window)


def no_mask(query: Tensor, key: Tensor, is_causal: bool, sliding_window: int | None, others: dict) -> Mask:
    """Of a call without an attention mask: packed documents, where the caller says so the way flash-attn is told."""
    documents, keys = others.get("cu_seq_lens_q"), others.get("cu_seq_lens_k")
    if documents is None:
        columns = query.new_empty((1, 0), dtype=torch.int32)
        return Mask("causal" if is_causal else "full", sliding_window, columns)
    same = documents is keys or (keys is not None and torch.equal(documents, keys))
    if not same or query.shape[2] != key.shape[2] or not is_causal:
        raise Unrepresentable("cu_seq_lens_q other than cu_seq_lens_k")
    return Mask("documents", sliding_window, documents.to(torch.int32).view(1, -1))


def dense_mask(
    query: Tensor,
    key: Tensor,
    attention_mask: Tensor | None,
    sliding_window: int | None,
    window: int | None,
    is_causal: bool,
    problem: Unrepresentable,
) -> Tensor:
    """What SDPA takes instead of attention_mask: (B, 1, Tq, Tk) bool, or what the caller gave. sliding_window: the
    model's own, window: accelerate's; where they cannot be in it, there is no fallback."""
    if attention_mask is not None and not masks.is_ours(attention_mask):
        if window is not None:
            raise NotImplementedError(f"{problem}, and accelerate() was asked for a window of {window}") from problem
        return attention_mask
    if attention_mask is None:
        mask = Mask("causal" if is_causal else "full", None, query.new_empty((1, 0), dtype=torch.int32))
    else:
        mask = masks.read(attention_mask)
    windows = [each for each in (mask.window, sliding_window if mask.causal else None, window) if each is not None]
    if windows and mask.kind.endswith("_any"):
        raise NotImplementedError(str(problem)) from problem
    mask = mask._replace(window=min(windows, default=None))
    return masks.visible_keys(mask, query.shape[0], query.shape[2], key.shape[2], query.device)


def records_attentions() -> bool:
    """Whether transformers is collecting attention weights, which it does not tell every layer."""
    if torch.compiler.is_compiling():
        return False
    collected = _active_collector.get()
    return collected is not None and "attentions" in collected


def fall_back(reason: str) -> None:
    if _fallback is None:
        raise NotImplementedError(
            f'{reason}. gptkernels.hf.register(fallback="sdpa") would run it with PyTorch\'s attention.'
        )
    warn_once(reason)


@cache
def warn_once(reason: str) -> None:
    warnings.warn(f"gptkernels: {reason}; running PyTorch's attention instead", stacklevel=3)
