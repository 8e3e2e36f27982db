"""An attention of transformers whose tokens are one rank's shard of each sequence."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..parallel import inside
from ..parallel.attention import shard_attention
from ..parallel.shards import Shard
from .masks import Mask

_alone = False


@torch.compiler.disable
def attend(shard: Shard | None, q: Tensor, k: Tensor, v: Tensor, mask: Mask, **options) -> Tensor:
    """As masks.attend, of q, k, v of a shard"""
    if shard is None:
        raise ValueError(
            "model must be accelerated with context_parallel=mesh, not run inside gptkernels.parallel.context: there "
            "its positions and masks would be those of a shard alone"
        )
    if mask.kind != "causal" or mask.columns.numel():
        raise ValueError(
            "attention_mask must hide nothing but what is ahead with context_parallel, where a whole sequence fills "
            f"each row, not be of kind {mask.kind}"
        )
    if _alone:
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return shard_attention(shard, q, k, v, window=mask.window, **options)


@contextmanager
def tokens_alone() -> Iterator[None]:
    """Inside, each token sees itself alone, and nobody is asked for anything."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def is_cut(shard: Shard | None) -> bool:
    """Whether attention's tokens are a shard, by its module or by a context"""
    return shard is not None or inside.current() is not None
