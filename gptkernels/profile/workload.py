"""A model and what it does in a step: training on random tokens, or a forward pass over them."""

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ..bench.memory import kept_for_backward, storage_bytes
from ..failures import UsageError
from ..models import cost
from ..models.config import PRESETS, GPTConfig
from .shares import PREFIX


@dataclass
class Subject:
    """A model before and after, and what it is known to cost"""

    name: str
    models: dict[str, nn.Module]  # "plain" and "ours"
    vocabulary: int
    context: int
    config: GPTConfig | None  # None for a model of somebody else's
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]  # (model, tokens, targets) -> ()
    logits: Callable[[nn.Module, Tensor], Tensor]

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """What FSDP gathers one at a time"""
        lists = [list(module) for module in model.modules() if isinstance(module, nn.ModuleList)]
        return max(lists, key=len, default=[])


def of_preset(name: str, backend: str, dropout: float, length: int | None, device: torch.device) -> Subject:
    """device: where the weights are drawn, which takes a CPU long for a large model; ours then waits on the CPU"""
    from ..models.gpt import GPT
    from ..models.plain import plain_twin

    if name not in PRESETS:
        raise UsageError(f"--model must be one of {', '.join(PRESETS)}, not {name}")
    config = GPTConfig.preset(name, backend=backend, dropout=dropout, attention_dropout=dropout)
    if config.objective != "next_token":
        raise UsageError(f"--model must predict next tokens, which {name} does not")
    if length and length > config.context:
        raise UsageError(f"--seq must be at most {name}'s context of {config.context}, not {length}")
    with device:
        ours = GPT(config)
    plain = plain_twin(ours)
    return Subject(
        name,
        {"plain": plain, "ours": ours.to("cpu")},
        config.vocabulary,
        config.context,
        config,
        lambda model, tokens, targets: model(tokens, targets),
        lambda model, tokens: model(tokens),
    )


def of_hf(path: str, backend: str) -> Subject:
    """A model of transformers, as it is and accelerated"""
    from transformers import AutoModelForCausalLM

    from .. import accelerate

    try:
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(f"--hf {path} cannot be loaded: {error}") from None
    ours = copy.deepcopy(plain)
    accelerate(ours, backend=backend)
    return Subject(
        path,
        {"plain": plain, "ours": ours},
        plain.config.vocab_size,
        getattr(plain.config, "max_position_embeddings", None) or 1024,
        None,
        # transformers shifts the labels itself.
        lambda model, tokens, targets: model(input_ids=tokens, labels=tokens, use_cache=False).loss,
        lambda model, tokens: model(input_ids=tokens, use_cache=False).logits,
    )


class Workload:
    """One model at work. `unwrapped` is the model, `model` what DDP or FSDP made of it."""

    def __init__(self, subject: Subject, unwrapped: nn.Module, options, workers):
        self.subject, self.unwrapped, self.device = subject, unwrapped, workers.device
        self.training = not options.infer
        self.dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
        unwrapped.train(self.training)
        self.model = workers.wrap(unwrapped, subject.blocks(unwrapped), self.dtype)
        generator = torch.Generator().manual_seed(workers.rank)
        tokens = torch.randint(subject.vocabulary, (options.batch, options.seq + 1), generator=generator)
        self.tokens, self.targets = (x.to(self.device).contiguous() for x in (tokens[:, :-1], tokens[:, 1:]))
        self.optimizer: torch.optim.Optimizer | None = None
        if self.training:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)

    def forward(self) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if self.training:
                return self.subject.loss(self.model, self.tokens, self.targets)
            with torch.no_grad():
                return self.subject.logits(self.model, self.tokens)

    def step(self) -> Tensor:
        """-> loss: (), or logits: (B, T, V)"""
        out = self.forward()
        if self.optimizer is None:
            return out
        out.backward()
        with record_function(PREFIX + "optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return out.detach()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self) -> float:
        """Of one step"""
        self.synchronize()
        started = time.perf_counter()
        self.step()
        self.synchronize()
        return time.perf_counter() - started

    def lasting(self) -> dict[str, int]:
        """Bytes of what is there between steps"""
        weights = itertools.chain(self.unwrapped.parameters(), self.unwrapped.buffers())
        found = {"weights": storage_bytes(weights)}
        if self.optimizer is not None:
            states = (x for state in self.optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
            found["optimizer"] = storage_bytes(states)
        return found

    def memory(self) -> dict[str, int]:
        """Bytes by what fills them; activations: what forward keeps for backward"""
        found = self.lasting()
        if self.optimizer is None:
            return found
        found["gradients"] = storage_bytes(self.unwrapped.parameters())
        with kept_for_backward(self.unwrapped.parameters()) as kept:
            out = self.forward()
        found["activations"] = storage_bytes(kept)
        kept.clear()
        out.backward()
        self.optimizer.zero_grad(set_to_none=True)
        return found


@dataclass(frozen=True)
class Flops:
    """Per token. hardware: with what is computed again to save memory."""

    dense: float
    window_aware: float
    hardware: float
    formula: str


def flops_of(subject: Subject, length: int, training: bool) -> Flops:
    config, passes = subject.config, 3 if training else 1
    if config is None:
        plain: Any = subject.models["plain"]
        weights = sum(p.numel() for name, p in plain.named_parameters() if p.ndim == 2 and "wpe" not in name)
        hf = plain.config
        scores = 4 * hf.hidden_size * hf.num_hidden_layers * (length + 1) / 2
        total = passes * (2 * weights + scores)
        again = hf.hidden_size * 2 * hf.num_hidden_layers * (length + 1) / 2 if training else 0.0
        return Flops(total, total, total + again, "2 weights + 4 C layers (T + 1) / 2 per token")
    dense, aware = (passes * cost.forward_flops_per_token(config, length, window_aware=w) for w in (False, True))
    again = 0.0
    if training:
        # Backward computes the scores again, and the MLP's first products where only their input was kept.
        again = sum(2 * config.width * cost.keys_seen(config, i, length) for i in range(config.layers))
        first = 2 if config.gated else 1
        again += first * 2 * config.width * config.hidden * config.layers * (config.save == "input")
    projections = "8 C^2" if config.kv_width == config.width else "4 C^2 + 4 C K"
    return Flops(
        dense,
        aware,
        aware + again,
        f"per token and layer {projections} + {6 if config.gated else 4} C F + 4 C keys, once 2 C V; "
        "keys: (T + 1) / 2 dense, w - w (w - 1) / 2 T banded",
    )
