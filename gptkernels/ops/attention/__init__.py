"""Attention, dense or banded: `window` is the number of keys that a query sees, its own included, or a pair (left,
right): the keys before and after its own.

What others call the same:
    transformers   sliding_window=W              window=W
    flash-attn     window_size=(w, 0)            window=w + 1, or window=(w, 0)
    flash-attn     window_size=(l, r)            window=(l, r), causal=False
    OpenAI sparse  local attention, W keys       window=W
"""

from .decode import decode_attention
from .op import AttentionFunction, attention

__all__ = ["AttentionFunction", "attention", "decode_attention"]
