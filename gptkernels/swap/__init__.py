"""Existing models on our kernels: accelerate(model), and gptkernels.hf.register() for transformers alone.

family() teaches accelerate() a kind of module that it does not know:

    class MyMLP(torch.nn.Module):               # with layers w1, act, w2, and a dropout after them
        ...

    gk.swap.family("my MLP", "mlp", MyMLP, forward=gk.swap.mlp_forward("w1", "act", "w2", "dropout"))

    def banded(module, x):                      # or in full
        settings = gk.swap.settings_of(module)  # .window and .backend, as accelerate() was called
        q, k, v = module.heads(x)
        return module.out(gk.attention(q, k, v, window=settings.window, backend=settings.backend))

    gk.swap.family("my attention", "attention", MyAttention, forward=banded)
"""

from .accelerate import accelerate
from .families import family
from .modules import original, settings_of
from .parts import mlp_forward
from .report import Report

__all__ = ["Report", "accelerate", "family", "mlp_forward", "original", "settings_of"]
