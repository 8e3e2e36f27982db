"""Dense attention in a ring: every rank's keys and values pass through every rank, one rank's at a time, and what each
adds to a query is merged by its log-sum-exp. No rank holds more than its own keys and those that it is about to use.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import calls
from .calls import Options, PartCall
from .exchange import Messages
from .layout import Part
from .shards import Shard


class Pair(NamedTuple):
    """A piece of this rank's queries, and one of another rank's keys that they see."""

    call: PartCall
    key: int  # of the piece, in the shard that has it


def pairs_of(shard: Shard, rank: int, options: Options, tokens: int) -> list[Pair]:
    """rank: whose keys; tokens: of a shard"""
    own, others = shard.layout.numbers(shard.rank), shard.layout.numbers(rank)
    piece = tokens // len(own)
    all_seen = replace(options, causal=False, window=(None, None))
    found = []
    for i, query in enumerate(own):
        for j, key in enumerate(others):
            if options.causal and key > query:
                continue
            spans = (query * piece, (query + 1) * piece), (key * piece, (key + 1) * piece)
            part = Part(*spans, (0, 1), (0, piece), (0, piece))
            found.append(Pair(PartCall(part, i * piece, options if key == query else all_seen), j * piece))
    return found


def keys_of(pair: Pair, held: Tensor) -> tuple[Tensor, Tensor]:
    """held: (2, B, Hkv, tokens, D) -> k, v of the pair"""
    k, v = held.narrow(3, pair.key, pair.call.count)
    return k, v


def passed_on(shard: Shard, held: Tensor, like: Tensor) -> Messages:
    """Sends what is held to the next rank, while that of the one before arrives"""
    tokens = held.shape[3]
    messages = Messages(shard, 2, like)
    messages.start([((shard.rank + 1) % shard.size, held)], [((shard.rank - 1) % shard.size, ((0, tokens),))])
    return messages


def arrived(messages: Messages) -> Tensor:
    ((_, message),) = messages.finish()
    return message


def merge(out: Tensor, lse: Tensor, found: Tensor, found_lse: Tensor) -> None:
    """out: (B, H, T, D) float32, lse: (B, H, T), changed in place to those over the keys of both"""
    both = torch.logaddexp(lse, found_lse)
    # A query that has seen no key yet has no weight, and not NaN.
    before, now = ((x - both).exp().masked_fill_(x == -torch.inf, 0).unsqueeze(-1) for x in (lse, found_lse))
    out.mul_(before).add_(found.float().mul_(now))
    lse.copy_(both)


def forward(
    shard: Shard, options: Options, q: Tensor, k: Tensor, v: Tensor, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q: (B, H, tokens, D), k, v: (B, Hkv, tokens, D) -> out: as q, lse: (B, H, tokens), float32"""
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=torch.float32, device=q.device)
    held = torch.stack((k, v))
    for step in range(shard.size):
        last = step == shard.size - 1
        messages = None if last else passed_on(shard, held, k)
        for pair in pairs_of(shard, (shard.rank - step) % shard.size, options, q.shape[2]):
            found = calls.forward(pair.call, q, keys_of(pair, held), None, seed)
            merge(pair.call.queries(out), lse.narrow(-1, pair.call.first, pair.call.count), *found)
        if messages is not None:
            held = arrived(messages)
    return out, lse


def backward(
    shard: Shard,
    options: Options,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv of the shard, float32. Each rank's sums of dk and dv follow its keys around, and then come home."""
    dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    held, sums = torch.stack((k, v)), None
    for step in range(shard.size):
        last = step == shard.size - 1
        messages = None if last else passed_on(shard, held, k)
        mine = torch.zeros_like(held, dtype=torch.float32)
        for pair in pairs_of(shard, (shard.rank - step) % shard.size, options, q.shape[2]):
            found = calls.backward(pair.call, dout, dlse, q, keys_of(pair, held), None, seed, out, lse)
            pair.call.queries(dq).add_(found[0])
            for total, grad in zip(keys_of(pair, mine), found[1:3], strict=True):
                total += grad
        # Those of the ranks before, on their way since the last step
        mine = mine if sums is None else mine + arrived(sums)
        sums = passed_on(shard, mine, mine[0])
        if messages is not None:
            held = arrived(messages)
    assert sums is not None
    dk, dv = arrived(sums)
    return dq, dk, dv
