"""PyTorch's own op, as a backend that `auto` takes where it was measured to be the fastest; and, on a CPU, the models'
own formula for calls without gradients, where the steps of a call would take as long as a small one."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import DTYPES
from ..native import PLAIN
from . import eager


def is_native(x, weight, eps, offset, cast, backend) -> bool:
    """What is left to PyTorch to refuse: shapes and layouts."""
    return (
        type(backend) is str
        and backend in ("auto", "eager")
        and type(x) in PLAIN
        and x.is_cpu
        and x.dtype in DTYPES
        and x.layout is torch.strided
        and x.numel() > 0
        and type(weight) in PLAIN
        and weight.is_cpu
        and (weight.dtype is x.dtype or weight.dtype is torch.float32)
        and weight.shape == x.shape[-1:]
        and type(eps) is float
        and 0 < eps < math.inf
        and type(offset) is float
        and math.isfinite(offset)
        and type(cast) is str
        and cast in CASTS
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


# Where the normalised row is rounded to x's dtype: before the product with the weight, or only after it.
CASTS = {"llama": True, "gemma": False, "gpt_oss": False}


# Gets what the caller passed, which may be anything, and answers NotImplemented where it is something else.
def native_rms_norm(x=None, weight=None, *, eps=1e-6, offset=0.0, cast="llama", backend="auto"):
    if not is_native(x, weight, eps, offset, cast, backend):
        return NotImplemented
    return eager.normalised(x, weight, eps, offset, CASTS[cast], x.dtype)[0]


def unsupported(x, residual, weight, eps, offset, cast_first, dropout) -> str | None:
    if dropout:
        return "has no dropout of ours"
    if offset:
        return "has no offset of the weight"
    if cast_first and weight is not None and x.dtype != torch.float32:
        return "rounds once, after the product with the weight"
    if residual is not None and residual.dtype != x.dtype:
        return f"takes one dtype, not {x.dtype} with {residual.dtype}"
    if weight is not None and weight.dtype != x.dtype:
        return f"takes one dtype, not {x.dtype} with {weight.dtype}"
    return None


def run(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, *_):
    """x, residual: (M, N) or x: (G, R, N) -> y, and with a residual also h, with PyTorch's own autograd"""
    h = x if residual is None else x + residual
    y = F.rms_norm(h, h.shape[-1:], weight, eps)
    return y if residual is None else (y, h)
