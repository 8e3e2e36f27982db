"""The same GPT in plain PyTorch, weights and all: what training is compared with, step by step and second by second."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import MLP, CausalSelfAttention, GatedMLP, LayerNorm, RMSNorm
from ..ops.attention.visibility import visible
from .gpt import GPT

ACTIVATIONS = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}


class PlainLayerNorm(LayerNorm):
    def forward(self, x, residual=None, dropout=0.0):
        if residual is None:
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
        h = F.dropout(x, dropout, self.training) + residual
        return F.layer_norm(h, self.weight.shape, self.weight, self.bias, self.eps), h


class PlainRMSNorm(RMSNorm):
    def forward(self, x, residual=None, dropout=0.0):
        if residual is None:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        h = F.dropout(x, dropout, self.training) + residual
        return F.rms_norm(h, self.weight.shape, self.weight, self.eps), h


class PlainMLP(MLP):
    def forward(self, x, residual=None):
        y = self.proj(ACTIVATIONS[self.activation](self.fc(x)))
        return y if residual is None else y + residual


class PlainGatedMLP(GatedMLP):
    def forward(self, x, residual=None):
        y = self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))
        return y if residual is None else y + residual


class PlainAttention(CausalSelfAttention):
    def forward(self, x, *, key_start=None, rotary=None, cache=None):
        if cache is not None:
            raise ValueError("cache must be None: the plain twin is there for comparisons, not for generation")
        q, k, v = self.project(x)
        if rotary is not None:
            q, k = self.rotate(q, k, *rotary)
        dropout = self.dropout if self.training else 0.0
        mask = self.mask(x, key_start)
        causal = self.causal and mask is None
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, causal, scale=self.scale, enable_gqa=self.heads != self.kv_heads
        )
        return self.out(out.transpose(1, 2).flatten(2))

    def rotate(self, q, k, cos, sin):
        cos, sin = (table.to(q.dtype).unsqueeze(-3) for table in (cos, sin))  # (1, T, D / 2) or (B, 1, T, D / 2)

        def rotated(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return rotated(q), rotated(k)

    def mask(self, x: Tensor, key_start: Tensor | None) -> Tensor | None:
        """x: (B, T, C) -> (T, T) or (B, 1, T, T) bool, True where a query sees a key; None: is_causal says it all"""
        if self.window is None and key_start is None:
            return None
        return visible(x.shape[1], x.shape[1], self.causal, self.window, key_start, x.device)


class PlainGPT(GPT):
    def loss(self, hidden, targets, reduction="mean"):
        loss = F.cross_entropy(self.logits(hidden).flatten(0, 1).float(), targets.flatten(), reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss


PLAIN = {
    GPT: PlainGPT,
    LayerNorm: PlainLayerNorm,
    RMSNorm: PlainRMSNorm,
    MLP: PlainMLP,
    GatedMLP: PlainGatedMLP,
    CausalSelfAttention: PlainAttention,
}


def plain_twin(model: GPT) -> GPT:
    """A copy of the model, with its own parameters, that calls PyTorch's functions where the model calls our ops."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return twin
