"""PyTorch's own attention as a backend that `auto` takes where it was measured to be the fastest."""

import torch.nn.functional as F
from torch import Tensor


def unsupported(q, k, v, key_start, cu_seqlens, causal, window, scale, dropout) -> str | None:
    if key_start is not None or cu_seqlens is not None or window is not None or dropout:
        return "takes neither padding, documents, windows nor dropout here"
    if q.device.type == "cpu":
        return "is what eager is made of on a CPU"
    if causal and q.shape[2] != k.shape[2]:
        return "counts the keys that a query sees from the first one, where there are more keys than queries"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, key_start, cu_seqlens, causal: bool, window, scale: float, dropout) -> Tensor:
    """q: (B, H, Tq, D), k, v: (B, Hkv, Tk, D) -> (B, H, Tq, D), with its own autograd"""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
