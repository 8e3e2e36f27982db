"""The context in which attention's q, k and v are one rank's shard of the sequence."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from ..dispatch import instead
from .attention import shard_attention
from .inside import become, refuse
from .shards import Shard, connect, shard_of


@contextmanager
def context(mesh, layout: str = "contiguous", method: str = "auto") -> Iterator[Shard]:
    """Inside, gptkernels.attention's q, k and v are this rank's shard of a sequence that the ranks of `mesh` cut
    between them (see shard_sequence), and our models' tokens too. Backward has to be inside as well.

    mesh: a DeviceMesh of one dimension, such as mesh["cp"].
    layout: "contiguous", or "zigzag", in which every rank has as much to do for a causal dense layer.
    method: how a dense layer gets the other ranks' keys and values: "gather" holds all of them at once, "ring" one
        rank's at a time, "auto" gathers up to RING_BYTES.
    Gradients are those of a rank's own loss: what DistributedDataParallel or FSDP averages over the ranks is right."""
    shard = shard_of(mesh, layout, method)
    connect(shard.group, mesh.device_type)
    before = become(shard)
    others = {
        "attention": torch.compiler.disable(partial(shard_attention, shard)),
        "decode_attention": refuse_cache,
    }
    before_ops = {name: instead.get(name) for name in others}
    instead.update(others)
    try:
        yield shard
    finally:
        become(before)
        for name, other in before_ops.items():
            if other is None:
                instead.pop(name, None)
            else:
                instead[name] = other


def refuse_cache(*_, **__):
    refuse("decode_attention", "a cache holds whole sequences")
