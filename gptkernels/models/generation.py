"""Generation with a cache of keys and values: dense layers keep all of them, banded layers a ring of `window`.

Prompts of unequal length are padded on the right: what is padding is never seen by a token before it, and the cache
of each row ends where its own prompt does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.attention import attention, decode_attention
from ..parallel import inside


class LayerCache:
    """Keys and values of one layer; the token at position p of a row is in slot p % capacity."""

    def __init__(self, cache: "KVCache", capacity: int):
        self.cache, self.capacity = cache, capacity
        self.k: Tensor | None = None  # (B, Hkv, capacity, D)
        self.v: Tensor | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None, backend: str
    ) -> Tensor:
        """q: (B, H, T, D), k, v: (B, Hkv, T, D) of the prompt, or of one more token -> (B, H, T, D)"""
        if self.k is None or self.v is None:
            self.k, self.v = self.prompt(k), self.prompt(v)
            return attention(q, k, v, window=window, scale=scale, backend=backend)
        slot = (self.cache.before % self.capacity).view(-1, 1, 1, 1).expand_as(k)
        self.k.scatter_(2, slot, k)
        self.v.scatter_(2, slot, v)
        lengths = (self.cache.before + 1).int()
        return decode_attention(q, self.k, self.v, lengths, window=window, scale=scale, backend=backend)

    def prompt(self, x: Tensor) -> Tensor:
        """x: (B, Hkv, T, D) of a prompt -> (B, Hkv, capacity, D), with the newest of each row in their slots"""
        newest = self.cache.lengths.view(-1, 1) - 1
        slots = torch.arange(self.capacity, device=x.device)
        # The last position before the row's end that belongs to the slot; a slot not used yet holds anything.
        position = (newest - (newest - slots) % self.capacity).clamp(min=0)
        return x.gather(2, position[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class KVCache:
    """For `rows` sequences of up to `capacity` tokens. lengths: (B,) int64, the tokens of each row so far."""

    def __init__(self, model, lengths: Tensor, capacity: int):
        self.lengths, self.before = lengths, torch.zeros_like(lengths)
        windows = [block.attention.window for block in model.layers()]
        self.layers = [LayerCache(self, capacity if window is None else min(window, capacity)) for window in windows]

    def positions(self, tokens: Tensor) -> Tensor:
        """tokens: (B, T) the prompts, or (B, 1) one more token -> (B, T) their positions; called once per step"""
        if self.layers[0].k is None:
            return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        if tokens.shape[1] != 1:
            raise ValueError(f"tokens must come one at a time after the prompt, not {tokens.shape[1]}")
        self.before = self.lengths
        self.lengths = self.lengths + 1
        return self.before.unsqueeze(1)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: the likeliest one."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    def choose(self, logits: Tensor, generator: torch.Generator | None) -> Tensor:
        """logits: (B, V) -> (B,)"""
        if self.temperature == 0:
            return logits.argmax(-1)
        weights = self.probabilities(logits)
        return torch.multinomial(weights, 1, generator=generator).squeeze(1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits: (B, V) -> (B, V), zero for what top_k and top_p leave out"""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            kept = logits.topk(self.top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < kept, -torch.inf)
        weights = logits.softmax(-1)
        if self.top_p is None or self.top_p == 1:
            return weights
        ordered, place = weights.sort(dim=-1, descending=True, stable=True)
        # The likeliest tokens up to the one that takes the sum to top_p, which is kept.
        left_out = ordered.cumsum(-1) - ordered >= self.top_p
        weights = weights.masked_fill(left_out.scatter(-1, place, left_out), 0)
        return weights / weights.sum(-1, keepdim=True)


def generate(
    model, prompts: Tensor | Sequence[Tensor], max_new_tokens: int, *, stop: int | None = None, **options
) -> Tensor | list[Tensor]:
    """prompts: (B, T) int64, or one (T,) tensor per row where they differ in length -> the same with what follows.

    stop: a token that ends a row. A tensor comes back as a tensor, filled up with `stop` behind the rows that ended;
    a list as a list, each row up to and including its stop token. options: as stream takes them.
    """
    steps = list(stream(model, prompts, max_new_tokens, stop=stop, **options))
    device = model.embedding.token.weight.device
    new = torch.stack(steps, 1) if steps else torch.zeros(len(prompts), 0, dtype=torch.int64, device=device)
    if isinstance(prompts, Tensor):
        return torch.cat((prompts.to(new), new), 1)
    rows = []
    for prompt, continued in zip(prompts, new, strict=True):
        if stop is not None and (continued == stop).any():
            continued = continued[: (continued == stop).nonzero()[0].item() + 1]
        rows.append(torch.cat((prompt.to(new), continued)))
    return rows


@torch.no_grad()
def stream(
    model,
    prompts: Tensor | Sequence[Tensor],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | None = None,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yields (B,) the next token of each row as it is chosen, `stop` behind a row's end; ends when every row has.

    temperature 0 takes the likeliest token; top_k and top_p keep the likeliest k, or those that reach a probability of
    p together. use_cache=False computes everything again for each token."""
    inside.refuse("generation", "every rank has whole prompts")
    sampling = Sampling(temperature, top_k, top_p)
    tokens, lengths = pad(prompts, model)
    longest = int(lengths.max()) + max_new_tokens
    if longest > model.config.context:
        raise ValueError(
            f"prompts and max_new_tokens must fit the context of {model.config.context} together, not {longest}"
        )
    cache = KVCache(model, lengths, longest) if use_cache else None
    rows = torch.arange(len(tokens), device=tokens.device)
    ended = torch.zeros_like(lengths, dtype=torch.bool)
    training = model.training
    model.eval()
    try:
        hidden = model.hidden(tokens, cache=cache)[rows, lengths - 1]
        for step in range(max_new_tokens):
            logits = model.logits(hidden)
            # A GPU would have to be waited for; there multinomial stops it.
            if logits.is_cpu and not logits.isfinite().all():
                raise ValueError("the model's logits are not finite: its weights may be NaN")
            chosen = model.agreed(sampling.choose(logits, generator))
            if stop is not None:
                chosen = chosen.masked_fill(ended, stop)
                ended |= chosen == stop
            yield chosen
            if step == max_new_tokens - 1 or (stop is not None and ended.all()):
                return
            if use_cache:
                hidden = model.hidden(chosen.unsqueeze(1), cache=cache)[:, 0]
            else:
                tokens = torch.cat((tokens, tokens.new_zeros(len(tokens), 1)), 1)
                tokens[rows, lengths] = chosen
                lengths = lengths + 1
                hidden = model.hidden(tokens)[rows, lengths - 1]
    finally:
        model.train(training)


def pad(prompts: Tensor | Sequence[Tensor], model) -> tuple[Tensor, Tensor]:
    """-> (B, T) int64 padded on the right with token 0, (B,) int64 lengths, on the model's device"""
    if model.config.objective != "next_token":
        raise ValueError(f'generation needs a model with objective="next_token", not "{model.config.objective}"')
    device = model.embedding.token.weight.device
    rows = [row.to(device) for row in prompts]
    if not rows or any(row.ndim != 1 or not row.numel() or row.is_floating_point() for row in rows):
        raise ValueError("prompts must be (B, T) token ids, or a list of (T,) ones, of at least one token each")
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True), lengths
