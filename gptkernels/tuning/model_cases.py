"""The calls of a model, as cases to tune."""

from typing import Any

import torch

from ..bench.cases import Case
from ..dispatch import recording
from ..failures import UsageError
from ..records import Record
from .classes import dtype_name

# Of a model that is tuned by name: as many as fill a GPU, in sequences of at most so many
TOKENS, LENGTH = 16384, 2048


def case_of(op: str, call: Any) -> Case:
    """The case that is most like a call"""
    if op == "attention":
        q, k = call.q, call.k
        packed = q.ndim == 3
        batch, tokens = (1, k.shape[0]) if packed else (q.shape[0], k.shape[2])
        shape = {"B": batch, "H": q.shape[1], "G": k.shape[1], "T": tokens, "D": q.shape[-1], "W": call.window or 0}
        # A whole softcap, which costs what any does
        cap = 0 if call.softcap is None else max(1, round(call.softcap))
        shape |= {"S": int(call.sinks is not None), "C": cap, "A": int(call.alibi_slopes is not None)}
    elif op == "decode_attention":
        q, cache = call.q, call.k_cache
        heads = {"H": q.shape[1], "G": cache.shape[1]}
        shape = {"B": q.shape[0], **heads, "T": call.capacity, "D": q.shape[-1], "W": call.window or 0}
        shape |= {"S": int(call.sinks is not None), "P": 0 if call.block_table is None else cache.shape[2]}
    elif op == "rope":
        (batch, heads, tokens, size), kv_heads = call.q.shape, call.k.shape[1]
        shape = {"B": batch, "H": heads, "G": kv_heads, "T": tokens, "D": size}
    else:
        _, shape = call.traits()
        if op == "linear_cross_entropy":
            shape["C"] = round(call.softcap)
    return Case.of(op, dtype_name(call.first), **shape)


def distinct(calls: list[tuple[str, Record]]) -> list[Case]:
    """One case for calls of the same shape; those without any rows are left out"""
    cases = [case_of(op, call) for op, call in calls if call.first.numel()]
    return list({(case.op, case.label, case.dtype): case.with_passes(passes_of(case)) for case in cases}.values())


def cases_of_model(name: str, dtype: str) -> list[Case]:
    """Of a GPT of ours, by its name: no weights are made"""
    from ..models import GPT, GPTConfig
    from ..models.config import PRESETS

    if name not in PRESETS:
        raise UsageError(f"--model must be one of {', '.join(PRESETS)}, not {name}")
    config = GPTConfig.preset(name)
    with torch.device("meta"), recording() as calls:
        tokens = torch.zeros(max(1, TOKENS // config.context), config.context, dtype=torch.long)
        GPT(config).to(getattr(torch, dtype))(tokens, tokens)
    return distinct(calls)


def cases_of_hf(path: str, dtype: str) -> list[Case]:
    """Of a causal model of transformers, accelerated: its configuration is read, and no weights"""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..swap.accelerate import accelerate

    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--hf {path} cannot be loaded: {error}") from None
    length = min(getattr(config, "max_position_embeddings", None) or LENGTH, LENGTH)
    with torch.device("meta"), recording() as calls:
        model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
        accelerate(model)
        tokens = torch.zeros(max(1, TOKENS // length), length, dtype=torch.long)
        calls.clear()  # those that accelerate tried
        model(tokens, labels=tokens)
    return distinct(calls)


def passes_of(case: Case) -> tuple[str, ...]:
    """Forward and backward apart where there are both: a setting belongs to one of them"""
    if case.op == "linear_cross_entropy":
        return ("both",)
    return ("fwd", "bwd") if case.has_gradients else ("fwd",)
