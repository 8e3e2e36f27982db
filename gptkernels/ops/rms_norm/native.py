"""PyTorch's own op, as a backend that `auto` takes where it was measured to be the fastest; and, on a CPU, the models'
own formula for calls without gradients, where the steps of a call would take as long as a small one."""

import math

import torch
import torch.nn.functional as F

from ..checks import DTYPES
from ..native import PLAIN
from . import eager
from .record import RMSNormCall


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


def unsupported(call: RMSNormCall) -> str | None:
    x, weight = call.x, call.weight
    if call.dropout:
        return "has no dropout of ours"
    if call.offset:
        return "has no offset of the weight"
    if call.cast_first and weight is not None and x.dtype != torch.float32:
        return "rounds once, after the product with the weight"
    for other in (call.residual, weight):
        if other is not None and other.dtype != x.dtype:
            return f"takes one dtype, not {x.dtype} with {other.dtype}"
    return None


def run(call: RMSNormCall):
    """-> y, and with a residual also h, with PyTorch's own autograd"""
    h = call.x if call.residual is None else call.x + call.residual
    y = F.rms_norm(h, h.shape[-1:], call.weight, call.eps)
    return y if call.residual is None else (y, h)
