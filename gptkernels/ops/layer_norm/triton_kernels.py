"""LayerNorm in Triton: launches of the kernels in triton_rows.py."""

import torch
import triton
from torch import Tensor

from ... import hardware
from ...records import Record
from ...remembered import remembered
from ...torch_library import torch_op
from ...triton_calls import Launch
from ...tuning import choices
from ..dropout import threshold
from ..rows import group_stride, zero_
from .outputs import bwd_outputs, fwd_outputs
from .record import LayerNormCall
from .triton_rows import layer_norm_bwd_kernel, layer_norm_bwd_reduce_kernel, layer_norm_fwd_kernel

# Longest row -> (ROWS, BLOCK, num_warps); BLOCK 0: the row's power of two.
# The last row of each serves longer rows still, BLOCK columns at a time. Of short rows a program has several, so that
# a thread has 16 bytes or more to load at once. Chosen for registers without spills;
# `gptkernels tune` finds better ones on the GPU at hand.
FWD_LAUNCH = {64: (32, 0, 4), 128: (16, 0, 4), 256: (8, 0, 4), 512: (2, 0, 4), 1024: (1, 0, 4), 2048: (1, 0, 4),
              4096: (1, 0, 8), 8192: (1, 0, 16), 16384: (1, 0, 16), 65536: (1, 8192, 16)}  # fmt: skip
BWD_LAUNCH = {64: (16, 0, 4), 128: (8, 0, 4), 256: (4, 0, 4), 512: (1, 0, 4), 1024: (1, 0, 4), 2048: (1, 0, 8),
              4096: (1, 0, 8), 8192: (1, 0, 16), 65536: (1, 4096, 16)}  # fmt: skip
# Philox does not fit into the registers beside a row of 8192.
BWD_DROPOUT_LAUNCH = {longest: row for longest, row in BWD_LAUNCH.items() if longest != 8192}
REDUCE_LAUNCH = {"BLOCK_P": 32, "BLOCK_N": 64, "num_warps": 8}
MAX_COLUMNS = 65536


def launch_row(table: dict, setting: str, op: str, call: Record) -> dict:
    columns = call.first.shape[-1]
    usual = next(row for longest, row in table.items() if columns <= longest)
    rows, block, warps = choices.setting(setting, op, call, usual)
    whole_row = block == 0
    return {
        "ROWS": rows,
        "BLOCK": triton.next_power_of_2(columns) if whole_row else block,
        "WHOLE_ROW": whole_row,
        "num_warps": warps,
    }


def unsupported(call: Record) -> str | None:
    """Also of RMSNorm's calls"""
    x = call.first
    if x.shape[-1] > MAX_COLUMNS:
        return f"takes rows of up to {MAX_COLUMNS} elements, not {x.shape[-1]}"
    return hardware.triton_unsupported(x.device)


@torch_op(fake=fwd_outputs)
def layer_norm_fwd(call: LayerNormCall) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """-> y, h = dropout(x) + residual: (M, N), mean, rstd: (M,)"""
    outputs = y, h, mean, rstd = fwd_outputs(call)
    x, weight = call.x, call.weight
    if x.shape[0] == 0:
        return outputs
    launch = fwd_launch(call)
    with hardware.on_device(x.device):
        launch(
            x,
            x if call.residual is None else call.residual,
            weight,
            weight if call.bias is None else call.bias,
            mean if call.seed is None else call.seed,
            y,
            y if h is None else h,
            mean,
            rstd,
        )
    return outputs


@remembered
def fwd_launch(call: LayerNormCall) -> Launch:
    return norm_fwd_launch("layer_norm", call, HAS_BIAS=call.bias is not None, RMS=False, CAST_FIRST=False)


def norm_fwd_launch(name: str, call, offset: float = 0.0, **flags: bool) -> Launch:
    """Of either norm"""
    x, residual, dropout = call.x, call.residual, call.dropout
    rows, columns, grouped = x.shape[:-1].numel(), x.shape[-1], x.ndim == 3
    row = launch_row(FWD_LAUNCH, f"{name}_fwd", name if residual is None else f"add_{name}", call)
    residual_stride = 0 if residual is None else residual.stride(0)
    return Launch(
        layer_norm_fwd_kernel,
        (triton.cdiv(rows, row["ROWS"]),),
        (
            *(rows, columns, x.stride(-2), group_stride(x), x.shape[-2] if grouped else 0, residual_stride),
            *(call.eps, offset, threshold(dropout), 1 / (1 - dropout)),
        ),
        HAS_RESIDUAL=residual is not None,
        HAS_DROPOUT=dropout > 0,
        GROUPED=grouped,
        **flags,
        **row,
    )


@torch_op(fake=bwd_outputs)
def layer_norm_bwd(
    call: LayerNormCall,
    dy: Tensor,
    dh: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """dy, dh: (M, N), mean, rstd: (M,) -> gradients of h, x: (M, N), weight, bias: (N,)"""
    grads = grad_h, grad_x, grad_weight, grad_bias = bwd_outputs(call, dy, dh, mean, rstd, weight_grad, bias_grad)
    h = call.x
    if h.shape[0] == 0:
        zero_(grads)
        return grads
    launch, reduce, partials_shape = bwd_launches(call, dy, dh, weight_grad, bias_grad)
    allocate = torch.empty if launch.constants["WHOLE_ROW"] else torch.zeros
    partials = allocate(partials_shape, dtype=torch.float32, device=h.device)
    with hardware.on_device(h.device):
        launch(
            dy,
            dy if dh is None else dh,
            h,
            call.weight,
            mean,
            rstd,
            mean if call.seed is None else call.seed,
            grad_h,
            grad_h if grad_x is None else grad_x,
            partials,
        )
        if weight_grad or bias_grad:
            reduce(partials, *(partials if grad is None else grad for grad in (grad_weight, grad_bias)))
    return grads


@remembered
def bwd_launches(
    call: LayerNormCall, dy: Tensor, dh: Tensor | None, weight_grad: bool, bias_grad: bool
) -> tuple[Launch, Launch, tuple[int, ...]]:
    return norm_bwd_launches("layer_norm", call, dy, dh, weight_grad, bias_grad, rms=False)


def norm_bwd_launches(
    name: str, call, dy: Tensor, dh: Tensor | None, weight_grad: bool, bias_grad: bool, rms: bool, offset: float = 0.0
) -> tuple[Launch, Launch, tuple[int, ...]]:
    """Of either norm -> of the gradients and of the sum over the programs' partial ones, and the shape of those"""
    h, dropout = call.x, call.dropout
    rows, columns, grouped = h.shape[:-1].numel(), h.shape[-1], h.ndim == 3
    table = BWD_DROPOUT_LAUNCH if dropout else BWD_LAUNCH
    row = launch_row(table, f"{name}_bwd", name if dh is None else f"add_{name}", call)
    programs = min(triton.cdiv(rows, row["ROWS"]), 4 * hardware.sm_count(h.device))
    has_partials = weight_grad or bias_grad
    dh_stride = 0 if dh is None else dh.stride(0)
    gradients = Launch(
        layer_norm_bwd_kernel,
        (programs,),
        (
            *(rows, columns, dy.stride(-2), group_stride(dy), dh_stride, h.stride(-2), group_stride(h)),
            *(h.shape[-2] if grouped else 0, offset, threshold(dropout), 1 / (1 - dropout)),
        ),
        HAS_DH=dh is not None,
        HAS_GRAD_X=dropout > 0 or dy.dtype != h.dtype,
        HAS_DROPOUT=dropout > 0,
        HAS_PARTIALS=has_partials,
        RMS=rms,
        GROUPED=grouped,
        **row,
    )
    reduce = Launch(
        layer_norm_bwd_reduce_kernel,
        (triton.cdiv(columns, REDUCE_LAUNCH["BLOCK_N"]),),
        (programs, columns),
        HAS_WEIGHT=weight_grad,
        HAS_BIAS=bias_grad,
        **REDUCE_LAUNCH,
    )
    return gradients, reduce, (1 if rms else 2, programs, columns) if has_partials else (0,)
