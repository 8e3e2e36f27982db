"""Modules over the ops, for people who write their own model.

block = gk.nn.CausalSelfAttention(768, 12, window=256), gk.nn.LayerNorm(768), gk.nn.MLP(768)
"""

from typing import Any

import torch
from torch import Tensor, nn

from .ops.attention import attention
from .ops.gated_mlp import gated_mlp
from .ops.layer_norm import add_layer_norm, layer_norm
from .ops.mlp import mlp
from .ops.rms_norm import add_rms_norm, rms_norm
from .ops.rope import rope


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension; with a residual, the addition before it in the same pass."""

    def __init__(self, width: int, *, bias: bool = True, eps: float = 1e-5, backend: str = "auto"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps, self.backend = eps, backend

    def forward(
        self, x: Tensor, residual: Tensor | None = None, dropout: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x, residual: (..., width) -> norm(x), or with a residual (norm(h), h), h = dropout(x) + residual

        dropout is the probability in training; in evaluation nothing is dropped."""
        if residual is None:
            return layer_norm(x, self.weight, self.bias, eps=self.eps, backend=self.backend)
        dropout = dropout if self.training else 0.0
        return add_layer_norm(x, residual, self.weight, self.bias, eps=self.eps, dropout=dropout, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, bias={self.bias is not None}, eps={self.eps}"


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension; with a residual, the addition before it in the same pass. offset, cast: see
    rms_norm; with an offset the weight starts as what makes 1 of it."""

    def __init__(
        self, width: int, *, eps: float = 1e-6, offset: float = 0.0, cast: str = "llama", backend: str = "auto"
    ):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.eps, self.offset, self.cast, self.backend = eps, offset, cast, backend

    def forward(
        self, x: Tensor, residual: Tensor | None = None, dropout: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x, residual: (..., width) -> norm(x), or with a residual (norm(h), h), h = dropout(x) + residual

        dropout is the probability in training; in evaluation nothing is dropped."""
        options: dict[str, Any] = {"eps": self.eps, "offset": self.offset, "cast": self.cast, "backend": self.backend}
        if residual is None:
            return rms_norm(x, self.weight, **options)
        return add_rms_norm(x, residual, self.weight, dropout=dropout if self.training else 0.0, **options)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, offset={self.offset}, cast={self.cast}"


class MLP(nn.Module):
    """proj(activation(fc(x))), without a stored activation."""

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        *,
        bias: bool = True,
        activation: str = "gelu_tanh",
        save: str = "preact",
        backend: str = "auto",
    ):
        super().__init__()
        self.fc = nn.Linear(width, hidden or 4 * width, bias)
        self.proj = nn.Linear(hidden or 4 * width, width, bias)
        self.activation, self.save, self.backend = activation, save, backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x, residual: (..., width) -> (..., width)"""
        return mlp(
            x,
            self.fc.weight,
            self.fc.bias,
            self.proj.weight,
            self.proj.bias,
            activation=self.activation,
            residual=residual,
            save=self.save,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}, save={self.save}"


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), with no more of it stored than `save` says."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        bias: bool = False,
        activation: str = "silu",
        save: str = "preact",
        backend: str = "auto",
    ):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias), nn.Linear(width, hidden, bias)
        self.down = nn.Linear(hidden, width, bias)
        self.activation, self.save, self.backend = activation, save, backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x, residual: (..., width) -> (..., width)"""
        return gated_mlp(
            x,
            self.gate.weight,
            self.up.weight,
            self.down.weight,
            gate_bias=self.gate.bias,
            up_bias=self.up.bias,
            down_bias=self.down.bias,
            activation=self.activation,
            residual=residual,
            save=self.save,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation}, save={self.save}"


class CausalSelfAttention(nn.Module):
    """Self-attention between a packed query, key and value projection and an output projection.

    window: how many keys a query sees, itself included; None: all. kv_heads: fewer than heads for grouped queries.
    qk_norm: RMSNorms, with `eps`, of each head's queries and keys before they are rotated.
    causal=False makes it the attention of an encoder."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        window: int | None = None,
        causal: bool = True,
        scale: float | None = None,
        qk_norm: bool = False,
        eps: float = 1e-6,
        bias: bool = True,
        out_bias: bool | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide the width of {width}, not {heads}")
        self.heads, self.kv_heads, self.head_size = heads, kv_heads or heads, width // heads
        self.window, self.causal, self.scale, self.dropout, self.backend = window, causal, scale, dropout, backend
        self.qkv = nn.Linear(width, (heads + 2 * self.kv_heads) * self.head_size, bias)
        self.q_norm = RMSNorm(self.head_size, eps=eps, backend=backend) if qk_norm else None
        self.k_norm = RMSNorm(self.head_size, eps=eps, backend=backend) if qk_norm else None
        self.out = nn.Linear(width, width, bias if out_bias is None else out_bias)

    def forward(
        self,
        x: Tensor,
        *,
        key_start: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
        cache=None,
    ) -> Tensor:
        """x: (B, T, width), key_start: (B,) int32 first real token of each row -> (B, T, width)

        rotary: cos and sin, as rotary_tables makes them, to rotate queries and keys by.
        cache: the keys and values of earlier tokens, such as gptkernels.models.generation.LayerCache; it attends."""
        q, k, v = self.project(x)
        if rotary is not None:
            q, k = self.rotate(q, k, *rotary)
        elif self.q_norm is not None:
            raise ValueError("rotary must be cos and sin for an attention with qk_norm, not None")
        if cache is None:
            out = attention(
                q,
                k,
                v,
                causal=self.causal,
                window=self.window,
                scale=self.scale,
                dropout=self.dropout if self.training else 0.0,
                key_start=key_start,
                backend=self.backend,
            )
        else:
            out = cache.attend(q, k, v, window=self.window, scale=self.scale, backend=self.backend)
        return self.out(out.transpose(1, 2).flatten(2))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, T, width) -> q: (B, H, T, D), k, v: (B, Hkv, T, D), views of one tensor"""
        packed = self.qkv(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2)
        return packed.split((self.heads, self.kv_heads, self.kv_heads), dim=1)

    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """q: (B, H, T, D), k: (B, Hkv, T, D), cos, sin: (T, D / 2) or (B, T, D / 2) -> q, k"""
        norms: dict[str, Any] = {}
        if self.q_norm is not None and self.k_norm is not None:
            norms = {"q_norm": self.q_norm.weight, "k_norm": self.k_norm.weight, "eps": self.q_norm.eps}
        return rope(q, k, cos, sin, rotary_dim=self.head_size, backend=self.backend, **norms)

    def extra_repr(self) -> str:
        groups = f", kv_heads={self.kv_heads}" if self.kv_heads != self.heads else ""
        return f"heads={self.heads}{groups}, head_size={self.head_size}, window={self.window}, causal={self.causal}"


def rotary_tables(positions: Tensor, size: int, base: float) -> tuple[Tensor, Tensor]:
    """positions: (T,) or (B, T) -> cos, sin: (T, size / 2) or (B, T, size / 2) float32, of heads of that size"""
    frequencies = 1.0 / base ** (torch.arange(0, size, 2, dtype=torch.float32, device=positions.device) / size)
    angles = positions.unsqueeze(-1).float() * frequencies
    return angles.cos(), angles.sin()
