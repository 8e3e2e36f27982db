"""Attention in Triton, dense and banded, forward and backward: the launchers."""

import triton
from torch import Tensor, empty_like
from triton.tools.tensor_descriptor import TensorDescriptor

from ... import cuda_library, hardware
from ...remembered import remembered
from ...torch_library import torch_op
from ...triton_calls import Launch, of_tensor
from ...tuning import choices
from ..dropout import threshold
from .outputs import bwd_outputs, fwd_outputs
from .record import AttentionCall, strides
from .sinks import sinks_grad, without_pairs
from .triton_bwd_dkdv_kernel import attention_bwd_dkdv_kernel
from .triton_bwd_dq_kernel import attention_bwd_dq_kernel
from .triton_fwd_kernel import attention_fwd_kernel
from .triton_launch import head_parts, launch_row

LOG2E = 1.4426950408889634
OLD_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 8)
# Keys and values of the heads that programs work on at a time: what stays in an L2 cache beside everything else.
SECTION_BYTES = 16 << 20
# Larger ones, multiplied as three products of tfloat32, do not fit the registers in the smallest tiles there are.
MAX_FLOAT32_HEAD_SIZE = 128


def unsupported(call: AttentionCall) -> str | None:
    if call.q.element_size() == 4 and call.q.shape[-1] > MAX_FLOAT32_HEAD_SIZE:
        return f"takes float32 head sizes up to {MAX_FLOAT32_HEAD_SIZE}, not {call.q.shape[-1]}"
    if OLD_TRITON and 128 < call.q.shape[-1] <= 192 and 100 <= hardware.arch(call.q.device) < 120:
        return f"takes no heads of 129 ... 192: Triton {triton.__version__} fails to compile them for this GPU"
    return hardware.triton_unsupported(call.q.device)


def variables(call: AttentionCall) -> tuple[Tensor, ...]:
    """What not every call has: with q in place of those that are absent, which kernels do not read"""
    tensors = call.key_start, call.cu_seqlens, call.cu_seqlens_k, call.alibi_slopes, call.seed
    return tuple([call.q if x is None else x for x in tensors])


def shared_arguments(call: AttentionCall):
    """What all kernels take. -> sizes, flags"""
    q, k, packed = call.q, call.k, call.cu_seqlens is not None
    rows, keys = (q.shape[0], k.shape[0]) if packed else (q.shape[2], k.shape[2])
    documents = 0 if call.cu_seqlens is None else call.cu_seqlens.shape[0] - 1
    d1, d2 = head_parts(q.shape[-1], q.element_size())
    dropped = threshold(call.dropout), 1 / (1 - call.dropout)
    behind, ahead = (0 if side is None else min(side + 1, rows + keys) for side in (call.left, call.right))
    slopes = call.alibi_slopes
    slope_stride = slopes.stride(0) if slopes is not None and slopes.ndim == 2 else 0
    bending = call.scale * LOG2E, (call.softcap or 0.0) * LOG2E, slope_stride
    sizes = (rows, keys, documents, behind, ahead, *bending, *dropped)
    flags = {
        "CAUSAL": call.causal,
        "LEFT": call.left is not None,
        "RIGHT": bool(call.right),
        "SOFTCAP": call.softcap is not None,
        "ALIBI": slopes is not None,
        "HAS_KEY_START": call.key_start is not None,
        "PACKED": packed,
        "OWN_KEYS": call.cu_seqlens_k is not None,
        "HAS_DROPOUT": call.dropout > 0,
        "PLACED": call.seed is not None and call.seed.shape[0] > 1,
        "D": q.shape[-1],
        "D1": d1,
        "D2": d2,
    }
    return sizes, flags


def addressable(*tensors: Tensor) -> bool:
    """Whether TMA can address them."""
    return all(x.numel() > 0 and not cuda_library.not_addressable(x) for x in tensors)


def descriptors(x: Tensor, row: dict, block: str) -> tuple[TensorDescriptor, ...] | None:
    """x: (B, H, T, D) or packed (T, H, D), loaded in blocks of row[block] tokens
    -> with TMA, one for each part of the head"""
    if not row["TMA"]:
        return None
    shape = x.shape if x.dim() == 4 else (1, x.shape[1], x.shape[0], x.shape[2])
    # The stride of a dimension of size 1 is never used, and may be one that TMA does not take.
    steps = [stride if size > 1 else 8 for size, stride in zip(shape, strides(x), strict=False)]
    parts = [part for part in head_parts(x.shape[-1], x.element_size()) if part]
    return tuple(TensorDescriptor(x, shape, [*steps, 1], [1, 1, row[block], part]) for part in parts)


def templates(made: tuple[TensorDescriptor, ...] | None) -> tuple[TensorDescriptor, ...] | None:
    """The same without the tensor, which must not be kept"""
    return None if made is None else tuple(of_tensor(descriptor, None) for descriptor in made)


def described(templates: tuple[TensorDescriptor, ...] | None, x: Tensor) -> tuple[TensorDescriptor, ...] | None:
    """The same of a tensor like the one that they were made of"""
    return None if templates is None else tuple(of_tensor(template, x) for template in templates)


def grid_arguments(x: Tensor, cu_seqlens: Tensor | None, block: int, bytes_per_head: int):
    """x: (B, H, T, D) or packed (T, H, D), cut into tiles of `block` tokens
    -> number of programs, (tiles of a head, heads of all rows, heads in a section)"""
    if cu_seqlens is None:
        tiles, batch_heads = triton.cdiv(x.shape[2], block), x.shape[0] * x.shape[1]
    else:
        # Each document's last tile may be a part of one; the lengths stay on the device.
        tiles, batch_heads = x.shape[0] // block + cu_seqlens.shape[0] - 1, x.shape[1]
    section = max(1, min(batch_heads, SECTION_BYTES // max(1, bytes_per_head)))
    return tiles * batch_heads, (tiles, batch_heads, section)


def bytes_of_head(k: Tensor) -> int:
    """k: (B, Hkv, Tk, D) or (T, Hkv, D) -> bytes of one head's keys and values"""
    return 2 * k.shape[-1] * k.shape[2 if k.dim() == 4 else 0] * k.element_size()


def measured_row(kernel: str, call: AttentionCall, may_use_tma: bool) -> dict:
    """Of the launch table, or what was measured for calls like this one where that does not use TMA in vain"""
    q = call.q
    arch = hardware.arch(q.device)
    row = launch_row(kernel, arch, q.element_size(), q.shape[-1], may_use_tma)
    if (call.softcap is not None or call.alibi_slopes is not None) and arch >= 90 and q.shape[-1] > 96:
        # What bends the scores takes registers, of which wide heads leave too few for whole blocks on the way.
        streamed = "BLOCK_M" if kernel == "dkdv" else "BLOCK_N"
        row[streamed] = max(16, row[streamed] // 2)
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "STAGES")
    usual = tuple(row[name] for name in names)
    setting = f"attention_{kernel}" + "_tma" * row["TMA"]
    return row | dict(zip(names, choices.setting(setting, "attention", call, usual), strict=True))


@torch_op(fake=fwd_outputs)
def attention_fwd(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """-> out: as q, lse: (B, H, Tq) or (H, T)"""
    out, lse = fwd_outputs(call)
    q, k, v = call.q, call.k, call.v
    if q.numel() == 0:
        return out, lse
    launch, k_parts, v_parts = fwd_launch(call, out=out)
    with hardware.on_device(q.device):
        sinks = q if call.sinks is None else call.sinks
        launch(q, k, v, described(k_parts, k), described(v_parts, v), out, lse, sinks, *variables(call))
    return out, lse


@remembered
def fwd_launch(call: AttentionCall, out: Tensor):
    """-> the launch, and descriptors of k and v where it takes them"""
    q, k, v = call.q, call.k, call.v
    sizes, flags = shared_arguments(call)
    row = measured_row("fwd", call, addressable(k, v))
    group = q.shape[1] // k.shape[1]
    programs, grid = grid_arguments(q, call.cu_seqlens, row["BLOCK_M"], bytes_of_head(k) // group)
    scalars = (*strides(q), *strides(k), *strides(v), *strides(out), *grid, q.shape[1], group, *sizes)
    flags["HAS_SINKS"] = call.sinks is not None
    launch = Launch(attention_fwd_kernel, (programs,), scalars, **flags, **row)
    return launch, *(templates(descriptors(x, row, "BLOCK_N")) for x in (k, v))


@torch_op(fake=bwd_outputs)
def attention_bwd(
    call: AttentionCall, dout: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dout, out: as q, lse, dlse: (B, H, Tq) or (H, T) -> gradients of q, k, v, sinks. The same on every run, with
    `deterministic` or without."""
    q, k, v = call.q, call.k, call.v
    if q.numel() == 0 or k.numel() == 0:
        return without_pairs(call, dout, out, lse, dlse)
    dq, dk, dv, dsinks = bwd_outputs(call, dout, out, lse, dlse)
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    delta = empty_like(lse)
    of_q, k_parts, v_parts, of_keys, dout_parts, q_parts = bwd_launches(call, dout, out, dlse, grads=(dq, dk, dv))
    others = variables(call)
    dlse_or_q = q if dlse is None else dlse
    with hardware.on_device(q.device):
        of_q(dout, q, k, v, described(k_parts, k), described(v_parts, v), out, lse, dlse_or_q, delta, dq, *others)
        of_keys(dout, q, k, v, described(dout_parts, dout), described(q_parts, q), lse, delta, dk, dv, *others)
    if call.sinks is not None and dsinks is not None:
        dsinks.copy_(sinks_grad(call.sinks, lse, delta))
    return dq, dk, dv, dsinks


@remembered
def bwd_launches(
    call: AttentionCall, dout: Tensor, out: Tensor, dlse: Tensor | None, grads: tuple[Tensor, Tensor, Tensor]
):
    dq, dk, dv = grads
    return *dq_launch(call, dout, out, dq, dlse is not None), *dkdv_launch(call, dout, dk, dv)


def dq_launch(call: AttentionCall, dout: Tensor, out: Tensor, dq: Tensor, has_dlse: bool):
    """-> the launch, and descriptors of k and v where it takes them"""
    q, k, v = call.q, call.k, call.v
    sizes, flags = shared_arguments(call)
    # Padding and other documents' tokens may be anything, and TMA would bring them in.
    may = call.key_start is None and call.cu_seqlens is None and addressable(k, v)
    row = measured_row("dq", call, may)
    group = q.shape[1] // k.shape[1]
    programs, grid = grid_arguments(q, call.cu_seqlens, row["BLOCK_M"], bytes_of_head(k) // group)
    flags["HAS_DLSE"] = has_dlse
    steps = [step for x in (dout, q, k, v, out, dq) for step in strides(x)]
    launch = Launch(attention_bwd_dq_kernel, (programs,), (*steps, *grid, q.shape[1], group, *sizes), **flags, **row)
    return launch, *(templates(descriptors(x, row, "BLOCK_N")) for x in (k, v))


def dkdv_launch(call: AttentionCall, dout: Tensor, dk: Tensor, dv: Tensor):
    """-> the launch, and descriptors of dout and q where it takes them"""
    q, k, v = call.q, call.k, call.v
    sizes, flags = shared_arguments(call)
    may = call.cu_seqlens is None and addressable(dout, q)
    row = measured_row("dkdv", call, may)
    group = q.shape[1] // k.shape[1]
    programs, grid = grid_arguments(k, call.key_bounds(), row["BLOCK_N"], bytes_of_head(q) * group)
    steps = [step for x in (dout, q, k, v, dk, dv) for step in strides(x)]
    launch = Launch(attention_bwd_dkdv_kernel, (programs,), (*steps, *grid, k.shape[1], group, *sizes), **flags, **row)
    return launch, *(templates(descriptors(x, row, "BLOCK_M")) for x in (dout, q))
