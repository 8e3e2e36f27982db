"""accelerate(model, context_parallel=mesh): a causal model of transformers whose input is a shard of each sequence.

Its attentions know the shard themselves (cut_attention.py), so that whatever computes them again for a backward pass
does, too. Before the model runs, its arguments are made those of a shard: positions in the whole sequence, labels
shifted across the shards' bounds, and a count that makes the mean over the ranks of their losses that of all labels.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..parallel.shards import Shard, connect, shard_of
from . import cut_attention, interface
from .modules import Family, Foreign
from .probe import TOLERANCE, undisturbed
from .report import Left
from .trial import inputs, without_hooks

IGNORED = -100
# Of a model's arguments, what says that a sequence is not the ranks' own shards and no more.
REFUSED = ("past_key_values", "encoder_hidden_states", "cu_seq_lens_q", "cu_seq_lens_k", "token_type_ids")
FLAGS = {
    "use_cache": "no rank has a whole sequence to go on from",
    "output_router_logits": "the router's loss is not the mean of those of shards",
}


def shard_for(model: nn.Module, mesh, found: dict[str, list[Family]], left: list[Left]) -> Shard:
    """ValueError for a model whose attention, positions or loss would be those of a shard alone"""
    shard = shard_of(mesh, "contiguous")
    name = type(model).__name__
    parameters = inspect.signature(type(model).forward).parameters
    if not interface.has_transformers({"": model}):
        raise ValueError(f"context_parallel must be None for {name}, which is no model of transformers")
    if "position_ids" not in parameters:
        raise ValueError(f"context_parallel must be None for {name}, whose forward takes no position_ids")
    if getattr(model.config, "is_encoder_decoder", False) or ("labels" in parameters and not is_causal(model)):
        raise ValueError(f"context_parallel must be None for {name}, which is no causal language model")
    if getattr(model.config, "output_router_logits", False):
        why = FLAGS["output_router_logits"]
        raise ValueError(f"context_parallel must be None for {name} with output_router_logits: {why}")
    attentions = [family.name for families in found.values() for family in families if family.part == "attention"]
    unreplaced = [row.path for row in left if row.part == "attention"]
    if not attentions or unreplaced or set(attentions) - {interface.NAME}:
        raise ValueError(
            f"context_parallel must be None for {name}: not all of its attention is ours {unreplaced or ''}"
        )
    connect(shard.group, mesh.device_type)
    return shard


def check_tokens_apart(model: Foreign) -> None:
    """ValueError where anything but attention takes something from one token to another (convolutions and recurrent
    layers do): by trying, with an attention in which each token sees itself alone."""
    name, changed = type(model).__name__, 2
    if next(model.parameters()).device.type == "meta":
        raise ValueError(f"context_parallel must be None for {name} on the meta device, where it cannot be tried")
    tokens = inputs(model)["input_ids"]
    others = tokens.clone()
    others[:, changed] = (others[:, changed] + 1) % model.config.get_text_config().vocab_size
    positions = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
    with torch.no_grad(), undisturbed(model), without_hooks(model), cut_attention.tokens_alone():
        before, after = (
            model.forward(input_ids=x, position_ids=positions, use_cache=False)[0].float() for x in (tokens, others)
        )
    moved = (after - before).abs().amax((0, 2))
    moved[changed] = 0
    if moved.max() > TOLERANCE.get(model.dtype, 1e-4) * before.abs().max():
        raise ValueError(f"context_parallel must be None for {name}: not only its attention takes tokens together")


def is_causal(model: Foreign) -> bool:
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def add_hook(model: nn.Module, shard: Shard) -> Callable[[], None]:
    """-> what removes it"""
    names = list(inspect.signature(type(model).forward).parameters)[1:]

    def before(module: nn.Module, positional: tuple, keywords: dict) -> tuple[tuple, dict]:
        given = dict(zip(names, positional, strict=False)) | keywords
        return (), of_shard(shard, given)

    return model.register_forward_pre_hook(before, with_kwargs=True).remove


def of_shard(shard: Shard, given: dict[str, Any]) -> dict[str, Any]:
    """given: what the model was called with -> what it runs with"""
    for name, why in FLAGS.items():
        if given.get(name):
            raise ValueError(f"{name} must be False with context_parallel: {why}")
    for name in REFUSED:
        if given.get(name) is not None:
            raise ValueError(f"{name} must be None with context_parallel, which cuts one sequence per row and no more")
    tokens = given.get("input_ids")
    tokens = given["inputs_embeds"] if tokens is None else tokens
    check_mask(given.get("attention_mask"))
    more: dict[str, Any] = {"use_cache": False, "attention_mask": None}
    positions = more["position_ids"] = shard.positions(tokens.shape[1], tokens.device).unsqueeze(0)
    told = given.get("position_ids")
    if told is not None and not bool((told == positions).all()):
        raise ValueError(
            f"position_ids must be None or count from {positions[0, 0]} on this rank with context_parallel: those of "
            "the whole sequence"
        )
    if given.get("labels") is not None:
        targets = given.get("shift_labels")
        targets = shifted(shard, given["labels"]) if targets is None else targets
        more["shift_labels"] = targets
        if given.get("num_items_in_batch") is None:
            count = shard.total((targets != given.get("ignore_index", IGNORED)).sum())
            more["num_items_in_batch"] = count / shard.size
    return given | more


def check_mask(mask: Tensor | None) -> None:
    """Padding on one rank hides keys from others, which nobody tells them."""
    if mask is not None and (mask.ndim != 2 or not bool(mask.all())):
        raise ValueError(
            "attention_mask must be None or (batch, tokens) without padding with context_parallel; labels of -100 "
            "leave padding on the right out of the loss"
        )


@torch.compiler.disable
def shifted(shard: Shard, labels: Tensor) -> Tensor:
    """labels: (B, tokens) of the shard -> of each token the label of the next, which for the last one is the next
    rank's first"""
    first = labels[:, :1].contiguous()
    firsts = [torch.empty_like(first) for _ in range(shard.size)]
    with shard.talking():
        dist.all_gather(firsts, first, group=shard.group)
    following = [*firsts[1:], torch.full_like(first, IGNORED)][shard.rank]
    return torch.cat((labels[:, 1:], following), 1)
