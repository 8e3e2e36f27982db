"""Decoding with PyTorch's own kernels, row by row: lengths are read on the host, which on CUDA waits for the GPU."""

import torch
from torch import Tensor

from ....torch_library import torch_op
from ...checks import check_cache_lengths
from ..eager import Terms, block_fwd
from ..outputs import decode_outputs
from ..record import DecodeCall
from ..visibility import visible_at


def unsupported(*_) -> str | None:
    return None


@torch_op(fake=decode_outputs)
def decode_attention_fwd(call: DecodeCall) -> Tensor:
    """-> out: as q"""
    q, k_cache, v_cache, window = call.q, call.k_cache, call.v_cache, call.window
    out = decode_outputs(call).zero_()
    tokens, capacity = q.shape[2], k_cache.shape[2]
    # Looked at here too: under torch.compile the op could not.
    for b, length in enumerate(check_cache_lengths(call.lengths, capacity, window)):
        if not length:
            continue
        oldest = max(0, length - tokens)  # position of the first query that exists
        first = 0 if window is None else max(0, oldest - window + 1)
        if length <= capacity:
            slots = slice(first, length)
            key = torch.arange(first, length, device=q.device)
        else:
            # The ring is full. Which position a slot holds does not matter to the sum, only to the mask.
            slots = slice(0, capacity)
            key = length - 1 - (length - 1 - torch.arange(capacity, device=q.device)) % capacity
        position = torch.arange(oldest, length, device=q.device).unsqueeze(1)
        row, queries = slice(b, b + 1), slice(tokens - (length - oldest), tokens)
        terms = Terms(visible_at(position, key, True, window), call.scale)
        out[row, :, queries] = block_fwd(q[row, :, queries], k_cache[row, :, slots], v_cache[row, :, slots], terms)[0]
    return out
