"""The weights with the pattern of dropout, for tests: computed once more, slowly."""

from typing import Any

import torch
from torch import Tensor

from ..ops.attention import reference
from ..ops.dropout import draw_seed


def random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def seed_after(state: Tensor, device: torch.device) -> Tensor:
    """The seed that attention drew of the generator in that state"""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
        return draw_seed(device)


def signed_weights(q: Tensor, k: Tensor, eye: Tensor, options: dict[str, Any], seed: Tensor) -> Tensor:
    """eye: as v, of which each row has a 1 for its own key -> what each key weighs in each query, negative where
    dropout took it away"""
    options = {name: value for name, value in options.items() if name != "deterministic"}
    with torch.no_grad():
        left = reference.attention(q.float(), k.float(), eye, **options, seed=seed)
        weights = reference.attention(q.float(), k.float(), eye, **{**options, "dropout": 0.0})
    return torch.where(left == 0, -weights, weights)


def over_later_blocks(weights: Tensor, lse: Tensor, head_size: int) -> Tensor:
    """weights: (..., Tq, Tk), lse: (..., Tq) -> exp(score - the largest score in the key's block or after
    it), which flash-attn has at hand as it goes from the last block to the first"""
    # Its blocks of keys with dropout
    size = 128 if head_size <= 32 else 32 if 96 < head_size <= 128 else 64
    scores = weights.abs().log() + lse.unsqueeze(-1)
    peaks = torch.stack([block.amax(-1) for block in scores.split(size, -1)], -1)
    peaks = peaks.flip(-1).cummax(-1).values.flip(-1).repeat_interleave(size, -1)[..., : weights.shape[-1]]
    return torch.where(weights == 0, weights, (scores - peaks).exp() * weights.sign())
