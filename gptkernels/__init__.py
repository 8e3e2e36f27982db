"""Fused kernels for GPTs: attention (dense and banded), LayerNorm, MLP and loss, in Triton and CUDA C++.

import gptkernels as gk
y = gk.layer_norm(x, weight, bias)                    # the fastest backend that supports the call
print(gk.explain(gk.layer_norm, x, weight, bias))     # which one that is, and why not the others
"""

from . import hf, nn, swap
from .dispatch import UnsupportedError, explain
from .models import GPT, GPTConfig
from .ops.attention import attention, decode_attention
from .ops.layer_norm import add_layer_norm, layer_norm
from .ops.linear_cross_entropy import linear_cross_entropy
from .ops.mlp import mlp
from .swap import accelerate

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "GPTConfig",
    "UnsupportedError",
    "accelerate",
    "add_layer_norm",
    "attention",
    "decode_attention",
    "explain",
    "hf",
    "layer_norm",
    "linear_cross_entropy",
    "mlp",
    "nn",
    "swap",
]
