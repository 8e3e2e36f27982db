"""Fused kernels for GPTs: attention (dense and banded), LayerNorm, RMSNorm, MLPs and loss, in Triton and CUDA C++.

import gptkernels as gk
y = gk.layer_norm(x, weight, bias)                    # the fastest backend that supports the call
print(gk.explain(gk.layer_norm, x, weight, bias))     # which one that is, and why not the others
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import flash_attn, hf, nn, parallel, swap
    from .dispatch import UnsupportedError, explain
    from .models import GPT, GPTConfig
    from .ops.attention import attention, decode_attention
    from .ops.gated_mlp import gated_mlp
    from .ops.layer_norm import add_layer_norm, layer_norm
    from .ops.linear_cross_entropy import linear_cross_entropy, linear_log_probs
    from .ops.linear_kl_div import linear_kl_div
    from .ops.mlp import mlp
    from .ops.rms_norm import add_rms_norm, rms_norm
    from .ops.rope import rope
    from .swap.accelerate import accelerate
    from .tuning.recorded import tune

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "GPTConfig",
    "UnsupportedError",
    "accelerate",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "decode_attention",
    "explain",
    "flash_attn",
    "gated_mlp",
    "hf",
    "layer_norm",
    "linear_cross_entropy",
    "linear_kl_div",
    "linear_log_probs",
    "mlp",
    "nn",
    "parallel",
    "rms_norm",
    "rope",
    "swap",
    "tune",
]

# Where each name lives. It is imported when it is first used, so that the command line starts without torch.
_HOMES = {
    "GPT": "models",
    "GPTConfig": "models",
    "UnsupportedError": "dispatch",
    "accelerate": "swap",
    "add_layer_norm": "ops.layer_norm",
    "add_rms_norm": "ops.rms_norm",
    "attention": "ops.attention",
    "decode_attention": "ops.attention",
    "explain": "dispatch",
    "gated_mlp": "ops.gated_mlp",
    "layer_norm": "ops.layer_norm",
    "linear_cross_entropy": "ops.linear_cross_entropy",
    "linear_kl_div": "ops.linear_kl_div",
    "linear_log_probs": "ops.linear_cross_entropy",
    "mlp": "ops.mlp",
    "rms_norm": "ops.rms_norm",
    "rope": "ops.rope",
    "tune": "tuning.recorded",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    elif name in __all__:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
