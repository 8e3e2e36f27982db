"""Decoding with PyTorch's own kernels, row by row: lengths are read on the host, which on CUDA waits for the GPU."""

import torch
from torch import Tensor

from ....torch_library import torch_op
from ... import checks
from ..eager import Terms, block_fwd
from ..outputs import decode_outputs
from ..record import DecodeCall
from ..sinks import add_sinks
from ..visibility import visible_at


def unsupported(*_) -> str | None:
    return None


@torch_op(fake=decode_outputs)
def decode_attention_fwd(call: DecodeCall) -> Tensor:
    """-> out: as q"""
    q, window = call.q, call.window
    out = decode_outputs(call).zero_()
    tokens, capacity = q.shape[2], call.capacity
    # Looked at here too: under torch.compile the op could not.
    lengths, starts = check_values(call), [0] * q.shape[0] if call.key_start is None else call.key_start.tolist()
    for b, length in enumerate(lengths):
        # Position of the first query; those before the sequence see no key but with causal=False.
        oldest = max(0, length - tokens) if call.causal else length - tokens
        first = max(0, starts[b], 0 if window is None else oldest - window + 1)
        if first >= length:
            continue
        if length <= capacity:
            slots = slice(first, length)
            key = torch.arange(first, length, device=q.device)
        else:
            # The ring is full. Which position a slot holds does not matter to the sum, only to the mask.
            slots = slice(0, capacity)
            key = length - 1 - (length - 1 - torch.arange(capacity, device=q.device)) % capacity
        position = torch.arange(oldest, length, device=q.device).unsqueeze(1)
        row, queries = slice(b, b + 1), slice(tokens - (length - oldest), tokens)
        seen = visible_at(position, key, call.causal, window) & (key >= first)
        k, v = (of_row(cache, call.block_table, b, slots) for cache in (call.k_cache, call.v_cache))
        terms = Terms(seen, call.scale, softcap=call.softcap)
        found, lse = block_fwd(q[row, :, queries], k, v, terms)
        found = found.masked_fill_(~seen.any(-1, keepdim=True), 0)
        if call.sinks is not None:
            add_sinks(found, lse, call.sinks)
        out[row, :, queries] = found
    return out


def of_row(cache: Tensor, block_table: Tensor | None, row: int, slots: slice) -> Tensor:
    """cache: (B, Hkv, capacity, D), or pages (pages, Hkv, page, D) of block_table: (B, P) -> (1, Hkv, slots, D)"""
    if block_table is None:
        return cache[row : row + 1, :, slots]
    page = cache.shape[2]
    pages = block_table[row, slots.start // page : -(-slots.stop // page)].long()
    start = slots.start - slots.start // page * page
    return cache[pages].transpose(0, 1).flatten(1, 2).unsqueeze(0)[:, :, start : start + slots.stop - slots.start]


def check_values(call: DecodeCall) -> list[int]:
    """The tokens of each row so far, read from the device; that they and the pages they are in exist"""
    window = call.window if call.block_table is None else None
    lengths = checks.check_cache_lengths(call.lengths, call.capacity, window)
    if call.block_table is not None:
        pages, page = call.k_cache.shape[:3:2]
        for row, (length, numbers) in enumerate(zip(lengths, call.block_table.tolist(), strict=True)):
            used = numbers[: -(-length // page)]
            if used and not 0 <= min(used) <= max(used) < pages:
                raise ValueError(f"block_table must have pages of 0 ... {pages - 1} in row {row}, not {used}")
    return lengths
