"""The rotation in Triton, alone or after RMSNorms of the heads: the launchers."""

import torch
import triton
from torch import Tensor

from ... import hardware
from ...remembered import remembered
from ...torch_library import torch_op
from ...triton_calls import Launch
from .outputs import fwd_outputs, norm_bwd_outputs, norm_fwd_outputs
from .record import NormRopeCall, RopeCall
from .triton_heads import rope_fwd_kernel, rope_norm_bwd_kernel

# Elements of a program's tile: two 16-byte loads of either half by each of 128 threads are under way.
TILE, WARPS = 2048, 4
# Of the backward pass with norms, whose programs go on over rows: what fills a GPU.
PROGRAMS_PER_SM = 4


def unsupported(call: RopeCall | NormRopeCall) -> str | None:
    return hardware.triton_unsupported(call.q.device)


@torch_op(fake=fwd_outputs)
def rope_fwd(call: RopeCall) -> tuple[Tensor, Tensor]:
    """-> q, k rotated, in their memory order"""
    q, k = fwd_outputs(call)
    if q.numel() + k.numel() == 0:
        return q, k
    launch = fwd_launch(call, outputs=(q, k))
    with hardware.on_device(q.device):
        launch(call.q, call.k, call.cos, call.sin, q, k, q, k, q, k)  # without norms these are not touched
    return q, k


@torch_op(fake=norm_fwd_outputs)
def rope_norm_fwd(call: NormRopeCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> q, k normalised and rotated, in their memory order, and 1 / rms of each head"""
    q, k, q_rstd, k_rstd = outputs = norm_fwd_outputs(call)
    if q.numel() + k.numel() == 0:
        return outputs
    launch = norm_fwd_launch(call, outputs=(q, k))
    with hardware.on_device(q.device):
        launch(call.q, call.k, call.cos, call.sin, q, k, *norms_alike(call), q_rstd, k_rstd)
    return outputs


@torch_op(fake=norm_bwd_outputs)
def rope_norm_bwd(
    call: NormRopeCall, dq: Tensor, dk: Tensor, q_rstd: Tensor, k_rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> gradients of q, k, q_norm, k_norm"""
    grad_q, grad_k, grad_q_norm, grad_k_norm = grads = norm_bwd_outputs(call, dq, dk, q_rstd, k_rstd)
    if dq.numel() + dk.numel() == 0:
        grad_q_norm.zero_(), grad_k_norm.zero_()
        return grads
    programs, launch = norm_bwd_launch(call, dq, dk, grads=(grad_q, grad_k))
    partials = torch.empty((2, programs, dq.shape[-1]), dtype=torch.float32, device=dq.device)
    with hardware.on_device(dq.device):
        tensors = call.q, call.k, call.cos, call.sin, grad_q, grad_k, *norms_alike(call), q_rstd, k_rstd
        launch(*tensors, dq, dk, partials)
    for grad, sums in zip((grad_q_norm, grad_k_norm), partials.sum(1), strict=True):
        grad.copy_(sums)
    return grads


def norms_alike(call: NormRopeCall) -> tuple[Tensor, Tensor]:
    """The norms' weights in one dtype, as the kernels choose between them"""
    if call.q_norm.dtype == call.k_norm.dtype:
        return call.q_norm, call.k_norm
    return call.q_norm.float(), call.k_norm.float()


@remembered
def fwd_launch(call: RopeCall, outputs: tuple[Tensor, Tensor]) -> Launch:
    rows, sizes, constants = shared_arguments(call, outputs)
    programs = triton.cdiv(rows, constants["ROWS"])
    flags = {"TRANSPOSED": call.transposed, "NORMED": False, "CAST_FIRST": False}
    return Launch(rope_fwd_kernel, (programs, 2), (*sizes, 0.0, 0.0), **constants, **flags)


@remembered
def norm_fwd_launch(call: NormRopeCall, outputs: tuple[Tensor, Tensor]) -> Launch:
    rows, sizes, constants = shared_arguments(call.rope(), outputs)
    programs = triton.cdiv(rows, constants["ROWS"])
    flags = {"TRANSPOSED": False, "NORMED": True, "CAST_FIRST": call.cast_first}
    return Launch(rope_fwd_kernel, (programs, 2), (*sizes, call.eps, call.offset), **constants, **flags)


@remembered
def norm_bwd_launch(call: NormRopeCall, dq: Tensor, dk: Tensor, grads: tuple[Tensor, Tensor]) -> tuple[int, Launch]:
    """-> the number of its programs, each with a row of partial sums for either norm's weight"""
    rows, sizes, constants = shared_arguments(call.rope(), grads)
    programs = min(triton.cdiv(rows, constants["ROWS"]), PROGRAMS_PER_SM * hardware.sm_count(dq.device))
    steps = [step for x in (dq, dk) for step in x.stride()[:3]]
    flags = {"CAST_FIRST": call.cast_first}
    return programs, Launch(rope_norm_bwd_kernel, (programs, 2), (*sizes, call.offset, *steps), **constants, **flags)


def shared_arguments(call: RopeCall, outputs: tuple[Tensor, Tensor]) -> tuple[int, tuple[int, ...], dict]:
    """-> the most rows of q or k, sizes and strides, constants"""
    q, k, size, rotated = call.q, call.k, call.q.shape[-1], call.rotated
    rows = [x.shape[0] * x.shape[1] * x.shape[2] for x in (q, k)]
    block, rest = triton.next_power_of_2(rotated // 2), size - rotated
    through = triton.next_power_of_2(rest) if rest else 0
    steps = [step for x in (q, k, *outputs) for step in x.stride()[:3]]
    steps += [step for t in (call.cos, call.sin) for step in (0 if t.ndim == 2 else t.stride(0), t.stride(-2))]
    constants = {
        "D": size,
        "R": rotated,
        "WHOLE": call.cos.shape[-1] == rotated,
        "INTERLEAVED": call.interleaved,
        "ROWS": max(1, TILE // max(2 * block, through)),
        "BLOCK_R": block,
        "BLOCK_REST": through,
        "num_warps": WARPS,
    }
    return max(rows), (q.shape[1], k.shape[1], q.shape[2], *rows, *steps), constants
