"""PyTorch's own attention as a backend that `auto` takes where it was measured to be the fastest: whole where its mask
is ours, else in blocks of queries with the keys that they see."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import Block, blocks
from .record import AttentionCall

# Queries of a block: as many as a band is wide, where that fills a GPU's kernels.
FEWEST_ROWS = 256


def unsupported(call: AttentionCall) -> str | None:
    if call.key_start is not None or call.cu_seqlens is not None or call.dropout:
        return "takes neither padding, documents nor dropout here"
    if call.added():
        return f"has no {', '.join(call.added())}"
    if call.q.device.type == "cpu":
        return "is what eager is made of on a CPU"
    return None


def run(call: AttentionCall) -> Tensor:
    """-> out: as q, with its own autograd"""
    q, k, v, left, right = call.q, call.k, call.v, call.left, call.right
    if left is None and (right is None or (call.causal and q.shape[2] == k.shape[2])):
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=call.causal, scale=call.scale, enable_gqa=grouped)
    rows = max(FEWEST_ROWS, call.window or q.shape[2])
    done = [of_block(call, block) for block in blocks(q.shape[2], k.shape[2], left, right, rows)]
    # The queries before the first block see no key.
    missing = q.shape[2] - sum(out.shape[2] for out in done)
    return torch.cat((q.new_zeros(*q.shape[:2], missing, q.shape[3]), *done), 2)


def of_block(call: AttentionCall, block: Block) -> Tensor:
    """-> (B, H, queries of the block, D)"""
    q, k, v = call.q[:, :, block.queries], *(x[:, :, block.keys] for x in (call.k, call.v))
    group = q.shape[1] // k.shape[1]
    if group > 1:  # PyTorch's fast kernels with a mask want a key head for each query head
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    seen = block.seen(q.device)
    if seen is None:
        return F.scaled_dot_product_attention(q, k, v, scale=call.scale)
    # A query that sees no key would have NaN gradients: it sees all of them, and what comes of it is dropped.
    blind = ~seen.any(-1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen | blind, scale=call.scale).masked_fill(blind, 0)
