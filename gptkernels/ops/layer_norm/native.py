"""PyTorch's own op: for the calls where nothing is gained over it, those in float32 on a CPU, and as a backend that
`auto` takes where it was measured to be the fastest."""

import math

import torch

from ..native import PLAIN, is_plain
from .record import LayerNormCall


def is_native(x, weight, bias, eps, backend) -> bool:
    """What is left to PyTorch to refuse: shapes, layouts, and parameters of other dtypes."""
    return (
        type(backend) is str
        and backend in ("auto", "eager")
        and type(x) in PLAIN
        and x.is_cpu
        and x.dtype is torch.float32
        and x.numel() > 0
        and type(weight) in PLAIN
        and weight.is_cpu
        and weight.ndim == 1
        and (bias is None or (type(bias) in PLAIN and bias.is_cpu))
        and type(eps) is float
        and 0 < eps < math.inf
    )


# These get what the caller passed, which may be anything, and answer NotImplemented where it is something else.


def native_layer_norm(x=None, weight=None, bias=None, *, eps=1e-5, backend="auto"):
    if not is_native(x, weight, bias, eps, backend):
        return NotImplemented
    return torch.layer_norm(x, weight.shape, weight, bias, eps)


def native_add_layer_norm(x=None, residual=None, weight=None, bias=None, *, eps=1e-5, dropout=0.0, backend="auto"):
    if (
        not is_native(x, weight, bias, eps, backend)
        or not is_plain(residual, torch.float32)
        or residual.shape != x.shape
        or type(dropout) is not float
        or dropout != 0
    ):
        return NotImplemented
    return run(LayerNormCall(x, residual, weight, bias, None, eps, dropout))


def unsupported(call: LayerNormCall) -> str | None:
    if call.dropout:
        return "has no dropout of ours"
    if call.weight.dtype != call.x.dtype or (call.residual is not None and call.residual.dtype != call.x.dtype):
        return f"takes one dtype, not {call.x.dtype} with others"
    return None


def run(call: LayerNormCall):
    """-> y: (M, N), and with a residual also h: (M, N), with PyTorch's own autograd. x may have any shape here."""
    h = call.x if call.residual is None else call.x + call.residual
    y = torch.layer_norm(h, call.weight.shape, call.weight, call.bias, call.eps)
    return y if call.residual is None else (y, h)
