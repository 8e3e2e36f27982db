"""The calls of a model, as cases to tune."""

import torch

from ..bench.cases import Case
from ..dispatch import recording
from ..failures import UsageError
from .classes import dtype_name

# Of a model that is tuned by name: as many as fill a GPU, in sequences of at most so many
TOKENS, LENGTH = 16384, 2048


def case_of(op: str, arguments: tuple) -> Case:
    """The case that is most like a call"""
    x, dtype = arguments[0], dtype_name(arguments[0])
    if op == "attention":
        q, k, window = arguments[0], arguments[1], arguments[6]
        packed = q.ndim == 3
        batch, tokens = (1, k.shape[0]) if packed else (q.shape[0], k.shape[2])
        shape = {"B": batch, "H": q.shape[1], "G": k.shape[1], "T": tokens, "D": q.shape[-1], "W": window or 0}
    elif op == "decode_attention":
        cache, window = arguments[1], arguments[4]
        heads = {"H": x.shape[1], "G": cache.shape[1]}
        shape = {"B": x.shape[0], **heads, "T": cache.shape[2], "D": x.shape[-1], "W": window or 0}
    else:
        shape = {"M": x.shape[0], "N": x.shape[1]}
        if op == "mlp":
            shape["F"] = arguments[1].shape[0]
        if op == "linear_cross_entropy":
            shape["V"] = arguments[1].shape[0]
    return Case.of(op, dtype, **shape)


def distinct(calls: list[tuple[str, tuple]]) -> list[Case]:
    """One case for calls of the same shape; those without any rows are left out"""
    cases = [case_of(op, arguments) for op, arguments in calls if arguments[0].numel()]
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
