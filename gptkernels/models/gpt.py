"""The reference GPT: GPT-1, GPT-2, GPT-3 with its dense and banded layers, ALBERT's shared ones, and Llama, in one
file.

Read it from the bottom: GPT embeds tokens, runs blocks, and predicts; a Block is attention and an MLP, each with a
norm. In a pre-norm block the addition to the residual stream waits for the next norm, which does both in one pass.

B: batch, T: tokens, C: width, E: width of the embeddings (C but for ALBERT), V: vocabulary.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import MLP, CausalSelfAttention, GatedMLP, LayerNorm, RMSNorm, rotary_tables
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.mlp.reference import ACTIVATIONS
from ..parallel import inside
from . import generation, hf_weights
from .config import GPTConfig

# Of a position without a token to predict
NO_TARGET = -100


def make_norm(config: GPTConfig, width: int) -> LayerNorm | RMSNorm:
    if config.norm == "rms":
        return RMSNorm(width, eps=config.eps, backend=config.backend)
    return LayerNorm(width, bias=config.bias, eps=config.eps, backend=config.backend)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, window: int | None):
        super().__init__()
        self.norm1 = make_norm(config, config.width)
        self.attention = CausalSelfAttention(
            config.width,
            config.heads,
            kv_heads=config.kv_heads,
            window=window,
            causal=config.causal,
            scale=config.attention_scale,
            qk_norm=config.qk_norm,
            eps=config.eps,
            bias=config.bias and config.qkv_bias,
            out_bias=config.bias,
            dropout=config.attention_dropout,
            backend=config.backend,
        )
        self.norm2 = make_norm(config, config.width)
        self.mlp = (GatedMLP if config.gated else MLP)(
            config.width,
            config.hidden,
            bias=config.bias,
            activation=config.activation,
            save=config.save,
            backend=config.backend,
        )
        self.dropout = config.dropout

    def projections(self) -> tuple[nn.Linear, nn.Linear]:
        """What feeds the residual stream"""
        return self.attention.out, self.mlp.down if isinstance(self.mlp, GatedMLP) else self.mlp.proj

    def forward(self, x: Tensor, residual: Tensor | None, **context) -> tuple[Tensor, Tensor | None]:
        """x: (B, T, C), not yet added to residual: (B, T, C), which is None before the first block -> the same"""
        if residual is None:
            y, residual = self.norm1(x), x
        else:
            y, residual = self.norm1(x, residual, self.dropout)
        x = self.attention(y, **context)
        y, residual = self.norm2(x, residual, self.dropout)
        return self.mlp(y), residual


class PostNormBlock(Block):
    def forward(self, x: Tensor, residual: Tensor | None, **context) -> tuple[Tensor, Tensor | None]:
        """x: (B, T, C) -> (B, T, C), and no residual"""
        x, _ = self.norm1(self.attention(x, **context), x, self.dropout)
        x, _ = self.norm2(self.mlp(x), x, self.dropout)
        return x, None


class Embedding(nn.Module):
    """Tokens, learned positions and token types, at the rank of the embeddings, then at the model's width."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        rank = config.embedding_rank or config.width
        self.token = nn.Embedding(config.vocabulary, rank)
        self.position = nn.Embedding(config.context, rank) if config.rotary is None else None
        self.token_type = nn.Embedding(config.token_types, rank) if config.token_types else None
        self.norm: LayerNorm | RMSNorm | None = None
        self.project: nn.Linear | None = None
        if config.embedding_rank:
            self.norm = make_norm(config, rank)
            self.project = nn.Linear(rank, config.width, config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tensor, positions: Tensor, token_types: Tensor | None) -> Tensor:
        """tokens, positions, token_types: (B, T) or broadcast to it -> (B, T, C)"""
        x = self.token(tokens)
        if self.position is not None:
            x = x + self.position(positions)
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros_like(tokens) if token_types is None else token_types)
        if self.project is None or self.norm is None:
            return self.dropout(x)
        return self.project(self.dropout(self.norm(x)))


class MaskedHead(nn.Module):
    """What ALBERT does to a hidden state before it is compared with the token embeddings, and its sentence order."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        rank = config.embedding_rank or config.width
        self.transform = nn.Linear(config.width, rank)
        self.activation = config.activation
        self.norm = LayerNorm(rank, eps=config.eps, backend=config.backend)
        self.vocabulary_bias = nn.Parameter(torch.zeros(config.vocabulary))
        self.pooler = nn.Linear(config.width, config.width)
        self.order = nn.Linear(config.width, 2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C) -> (..., E)"""
        return self.norm(ACTIVATIONS[self.activation](self.transform(x)))

    def order_logits(self, first: Tensor) -> Tensor:
        """first: (B, C), the hidden state of each row's first token -> (B, 2): in order, swapped"""
        return self.order(self.pooler(first).tanh())


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config)
        block = PostNormBlock if config.norm == "post" else Block
        if config.share_layers and len(set(config.pattern)) > 1:
            raise ValueError("pattern must be of one kind where layers share their weights")
        self.blocks = nn.ModuleList(
            block(config, config.layer_window(layer)) for layer in range(1 if config.share_layers else config.layers)
        )
        self.final_norm = None if config.norm == "post" else make_norm(config, config.width)
        self.masked_head = MaskedHead(config) if config.objective == "masked" else None
        rank = config.width if config.objective == "next_token" else config.embedding_rank or config.width
        self.head = None if config.tied else nn.Linear(rank, config.vocabulary, bias=False)
        self.unproject: nn.Linear | None = None
        if config.tied and rank != self.embedding.token.embedding_dim:
            # What undoes the factorisation, for a causal model with embeddings of a lower rank.
            self.unproject = nn.Linear(config.width, self.embedding.token.embedding_dim, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        std = self.config.init_std
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, std)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    module.bias.zero_()
        if self.embedding.position is not None:
            self.embedding.position.weight.normal_(0.0, self.config.position_std)
        if self.config.scale_residual_init:
            for block in dict.fromkeys(self.layers()):
                for projection in block.projections():
                    projection.weight.normal_(0.0, std / math.sqrt(2 * self.config.layers))

    def layers(self) -> list[Block]:
        """The blocks in the order in which they run; a shared one is there again and again."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        return blocks * (self.config.layers if self.config.share_layers else 1)

    def hidden(
        self,
        tokens: Tensor,
        *,
        key_start: Tensor | None = None,
        token_types: Tensor | None = None,
        cache=None,
    ) -> Tensor:
        """tokens, token_types: (B, T) int64, key_start: (B,) int32 first real token of each left-padded row
        -> (B, T, C), what the head reads

        cache: a generation.KVCache, which knows the tokens before these."""
        shard = inside.current()
        check_tokens(tokens, self.config, 1 if shard is None else shard.size)
        if cache is not None:
            inside.refuse("generation", "a cache holds whole sequences")
            positions = cache.positions(tokens)
        else:
            if shard is None:
                positions = torch.arange(tokens.shape[1], device=tokens.device)
            else:
                positions = shard.positions(tokens.shape[1], tokens.device)
            if key_start is not None:
                positions = (positions - key_start.unsqueeze(1)).clamp(min=0)
        x, residual = self.embedding(tokens, positions, token_types), None
        rotary = self.rotary_tables(positions, x.dtype)
        for number, block in enumerate(self.layers()):
            layer_cache = None if cache is None else cache.layers[number]
            x, residual = block(x, residual, key_start=key_start, rotary=rotary, cache=layer_cache)
        if self.final_norm is None:
            return x
        return self.final_norm(x, residual, self.config.dropout)[0]

    def rotary_tables(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """positions: (T,) or (B, T) -> cos, sin for all layers, None where positions are learned"""
        if self.config.rotary is None:
            return None
        cos, sin = rotary_tables(positions, self.config.head_size, self.config.rotary)
        return cos.to(dtype), sin.to(dtype)

    def head_weight(self) -> Tensor:
        """(V, E)"""
        return self.embedding.token.weight if self.head is None else self.head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., C) -> (..., V)"""
        return self.token_logits(*self.before_head(hidden))

    def before_head(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        """hidden: (..., C) -> (..., E), which the head's weight multiplies, and the bias after it: (V,)"""
        if self.masked_head is not None:
            return self.masked_head(hidden), self.masked_head.vocabulary_bias
        return self.reduced(hidden), None

    def token_logits(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: (..., E), bias: (V,) -> (..., V)"""
        return F.linear(x, self.head_weight(), bias)

    def reduced(self, hidden: Tensor) -> Tensor:
        return hidden if self.unproject is None else self.unproject(hidden)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        key_start: Tensor | None = None,
        token_types: Tensor | None = None,
        order: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """tokens: (B, T) int64 -> logits: (B, T, V); with targets, the loss, and then no logits are ever stored.

        targets: (B, T) int64, the token to predict at each position, already shifted; -100 where there is none.
        order: (B,) int64 for the masked objective: 1 where the two segments were swapped; its loss is added.
        reduction: "mean", "sum" or "none" -> (B, T).
        Inside gptkernels.parallel.context all tokens are this rank's shard, and the mean over the ranks of the mean
        loss is that of the whole."""
        hidden = self.hidden(tokens, key_start=key_start, token_types=token_types)
        if targets is None:
            return self.logits(hidden)
        loss = self.loss(hidden, targets, reduction)
        if order is None:
            return loss
        return loss + F.cross_entropy(self.order_logits(hidden, key_start).float(), order)

    def loss(self, hidden: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """hidden: (B, T, C), targets: (B, T)"""
        shard = inside.current() if reduction == "mean" else None
        loss = self.token_loss(*self.before_head(hidden), targets, reduction if shard is None else "sum")
        return loss if shard is None else shard.share_of_mean(loss, (targets != NO_TARGET).sum())

    def token_loss(self, x: Tensor, bias: Tensor | None, targets: Tensor, reduction: str) -> Tensor:
        """x: (..., E), bias: (V,), targets: (...)"""
        options: dict[str, Any] = {"bias": bias, "reduction": reduction, "backend": self.config.backend}
        return linear_cross_entropy(x, self.head_weight(), targets, **options)

    def agreed(self, chosen: Tensor) -> Tensor:
        """chosen: (B,) tokens that were drawn -> what all processes that run this model together take for them"""
        return chosen

    def order_logits(self, hidden: Tensor, key_start: Tensor | None = None) -> Tensor:
        """hidden: (B, T, C) -> (B, 2)"""
        if self.masked_head is None:
            raise ValueError('order needs a model with objective="masked"')
        inside.refuse("order", "only one rank has a row's first token")
        if key_start is None:
            return self.masked_head.order_logits(hidden[:, 0])
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        return self.masked_head.order_logits(hidden[rows, key_start.long()])

    def generate(self, prompts, max_new_tokens: int, **options):
        """Continues prompts: see generation.generate for the options."""
        return generation.generate(self, prompts, max_new_tokens, **options)

    @classmethod
    def from_hf(cls, source, **changes) -> "GPT":
        """The model of a transformers model, a folder with one, or a name on the Hugging Face hub: see hf_weights."""
        return hf_weights.from_hf(cls, source, **changes)

    def to_hf(self, folder: str | Path | None = None):
        """This model as a transformers model, or, with a folder, written there for from_pretrained."""
        return hf_weights.to_hf(self) if folder is None else hf_weights.save_hf(self, Path(folder))

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def check_tokens(tokens: Tensor, config: GPTConfig, shards_of_it: int = 1) -> None:
    """shards_of_it: tokens are one of so many of a sequence"""
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have shape (B, T), not {tuple(tokens.shape)}")
    length = tokens.shape[1] * shards_of_it
    if length > config.context:
        raise ValueError(f"tokens must be at most the context of {config.context} long, not {length}")
