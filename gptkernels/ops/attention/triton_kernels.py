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
from .triton_bwd_kernels import attention_bwd_dkdv_kernel, attention_bwd_dq_kernel
from .triton_fwd_kernel import attention_fwd_kernel
from .triton_launch import head_parts, launch_row

LOG2E = 1.4426950408889634
# Keys and values of the heads that programs work on at a time: what stays in an L2 cache beside everything else.
SECTION_BYTES = 16 << 20
# Larger ones, multiplied as three products of tfloat32, do not fit the registers in the smallest tiles there are.
MAX_FLOAT32_HEAD_SIZE = 128


def unsupported(q: Tensor, *_) -> str | None:
    if q.element_size() == 4 and q.shape[-1] > MAX_FLOAT32_HEAD_SIZE:
        return f"takes float32 head sizes up to {MAX_FLOAT32_HEAD_SIZE}, not {q.shape[-1]}"
    return hardware.triton_unsupported(q.device)


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, head and token in (B, H, T, D) or packed (T, H, D)"""
    if x.dim() == 4:
        return x.stride(0), x.stride(1), x.stride(2)
    return 0, x.stride(1), x.stride(0)


def pointers(q: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """With q in place of those that are absent: kernels do not read them"""
    return tuple(q if x is None else x for x in tensors)


def shared_arguments(q, k, key_start, cu_seqlens, causal, window, scale, dropout):
    """What all kernels take. -> sizes, flags"""
    packed = cu_seqlens is not None
    rows, keys = (q.shape[0], k.shape[0]) if packed else (q.shape[2], k.shape[2])
    documents = cu_seqlens.shape[0] - 1 if packed else 0
    window = None if window is None else min(window, rows + keys)
    d1, d2 = head_parts(q.shape[-1], q.element_size())
    sizes = (rows, keys, documents, window or 0, scale * LOG2E, threshold(dropout), 1 / (1 - dropout))
    flags = {
        "CAUSAL": causal,
        "WINDOWED": window is not None,
        "HAS_KEY_START": key_start is not None,
        "PACKED": packed,
        "HAS_DROPOUT": dropout > 0,
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


def measured_row(kernel: str, q, k, v, cu_seqlens, window, may_use_tma: bool) -> dict:
    """Of the launch table, or what was measured for calls like this one where that does not use TMA in vain"""
    row = launch_row(kernel, hardware.arch(q.device), q.element_size(), q.shape[-1], may_use_tma)
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "STAGES")
    usual = tuple(row[name] for name in names)
    arguments = (q, k, v, None, cu_seqlens, True, window)
    setting = f"attention_{kernel}" + "_tma" * row["TMA"]
    return row | dict(zip(names, choices.setting(setting, "attention", arguments, usual), strict=True))


@torch_op(fake=fwd_outputs)
def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_start: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """q: (B, H, Tq, D), k, v: (B, Hkv, Tk, D), key_start: (B,) or packed q: (T, H, D), k, v: (T, Hkv, D),
    cu_seqlens: (N + 1,); seed: (1,) -> out: as q, lse: (B, H, Tq) or (H, T)"""
    out, lse = fwd_outputs(q, k, v, key_start, cu_seqlens, seed, causal, window, scale, dropout)
    if q.numel() == 0:
        return out, lse
    launch, k_parts, v_parts = fwd_launch(q, k, v, out, key_start, cu_seqlens, causal, window, scale, dropout)
    variables = pointers(q, key_start, cu_seqlens, seed)
    with hardware.on_device(q.device):
        launch(q, k, v, described(k_parts, k), described(v_parts, v), out, lse, *variables)
    return out, lse


@remembered
def fwd_launch(q, k, v, out, key_start, cu_seqlens, causal, window, scale, dropout):
    """-> the launch, and descriptors of k and v where it takes them"""
    sizes, flags = shared_arguments(q, k, key_start, cu_seqlens, causal, window, scale, dropout)
    row = measured_row("fwd", q, k, v, cu_seqlens, window, addressable(k, v))
    group = q.shape[1] // k.shape[1]
    programs, grid = grid_arguments(q, cu_seqlens, row["BLOCK_M"], bytes_of_head(k) // group)
    scalars = (*strides(q), *strides(k), *strides(v), *strides(out), *grid, q.shape[1], group, *sizes)
    launch = Launch(attention_fwd_kernel, (programs,), scalars, **flags, **row)
    return launch, *(templates(descriptors(x, row, "BLOCK_N")) for x in (k, v))


@torch_op(fake=bwd_outputs)
def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_start: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    dropout: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dout, q, out: (B, H, Tq, D), k, v: (B, Hkv, Tk, D), lse: (B, H, Tq), or packed as in attention_fwd
    -> dq, dk, dv: as q, k, v. The same on every run, with `deterministic` or without."""
    grads = dq, dk, dv = bwd_outputs(
        dout, q, k, v, out, lse, key_start, cu_seqlens, seed, causal, window, scale, dropout, deterministic
    )
    if q.numel() == 0 or k.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    delta = empty_like(lse)
    like = dout, q, k, v, out, *grads, key_start, cu_seqlens, causal, window, scale, dropout
    variables = pointers(q, key_start, cu_seqlens, seed)
    with hardware.on_device(q.device):
        launch, k_parts, v_parts = dq_launch(*like)
        launch(dout, q, k, v, described(k_parts, k), described(v_parts, v), out, lse, delta, dq, *variables)
        launch, dout_parts, q_parts = dkdv_launch(*like)
        launch(dout, q, k, v, described(dout_parts, dout), described(q_parts, q), lse, delta, dk, dv, *variables)
    return grads


@remembered
def dq_launch(dout, q, k, v, out, dq, dk, dv, key_start, cu_seqlens, causal, window, scale, dropout):
    """-> the launch, and descriptors of k and v where it takes them"""
    sizes, flags = shared_arguments(q, k, key_start, cu_seqlens, causal, window, scale, dropout)
    # Padding and other documents' tokens may be anything, and TMA would bring them in.
    may = key_start is None and cu_seqlens is None and addressable(k, v)
    row = measured_row("dq", q, k, v, cu_seqlens, window, may)
    group = q.shape[1] // k.shape[1]
    programs, grid = grid_arguments(q, cu_seqlens, row["BLOCK_M"], bytes_of_head(k) // group)
    steps = [step for x in (dout, q, k, v, out, dq) for step in strides(x)]
    launch = Launch(attention_bwd_dq_kernel, (programs,), (*steps, *grid, q.shape[1], group, *sizes), **flags, **row)
    return launch, *(templates(descriptors(x, row, "BLOCK_N")) for x in (k, v))


@remembered
def dkdv_launch(dout, q, k, v, out, dq, dk, dv, key_start, cu_seqlens, causal, window, scale, dropout):
    """-> the launch, and descriptors of dout and q where it takes them"""
    sizes, flags = shared_arguments(q, k, key_start, cu_seqlens, causal, window, scale, dropout)
    may = cu_seqlens is None and addressable(dout, q)
    row = measured_row("dkdv", q, k, v, cu_seqlens, window, may)
    group = q.shape[1] // k.shape[1]
    programs, grid = grid_arguments(k, cu_seqlens, row["BLOCK_N"], bytes_of_head(q) * group)
    steps = [step for x in (dout, q, k, v, dk, dv) for step in strides(x)]
    launch = Launch(attention_bwd_dkdv_kernel, (programs,), (*steps, *grid, k.shape[1], group, *sizes), **flags, **row)
    return launch, *(templates(descriptors(x, row, "BLOCK_M")) for x in (dout, q))
