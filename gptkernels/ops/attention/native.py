"""PyTorch's own attention as a backend that `auto` takes where it was measured to be the fastest."""

import torch.nn.functional as F
from torch import Tensor

from .record import AttentionCall


def unsupported(call: AttentionCall) -> str | None:
    if call.key_start is not None or call.cu_seqlens is not None or call.window is not None or call.dropout:
        return "takes neither padding, documents, windows nor dropout here"
    if call.q.device.type == "cpu":
        return "is what eager is made of on a CPU"
    if call.causal and call.q.shape[2] != call.k.shape[2]:
        return "counts the keys that a query sees from the first one, where there are more keys than queries"
    return None


def run(call: AttentionCall) -> Tensor:
    """-> out: as q, with its own autograd"""
    q, k, v = call.q, call.k, call.v
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=call.causal, scale=call.scale, enable_gqa=grouped)
