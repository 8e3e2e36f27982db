"""The chunked loss with one Triton kernel over the rows of a chunk; the products are cuBLAS's."""

import triton
import triton.language as tl

from ... import hardware
from ...remembered import remembered
from ...triton_calls import Launch
from . import chunks
from .record import LossCall


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # (R, V), rows stride apart; replaced by their gradient if WITH_GRAD
    targets_ptr,  # (R,) int64
    losses_ptr,  # (R,) float32
    lse_ptr,  # (R,) float32
    scale_ptr,  # () or (R,) float32
    V,
    stride,
    scale_stride,
    ignore_index,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: a running maximum and sum, then the loss, then the gradient over the logits themselves."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    counted = target != ignore_index
    valid = (target >= 0) & (target < V)
    lane = tl.arange(0, BLOCK)

    peak = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        scores = tl.load(logits_ptr + start + lane, mask=start + lane < V, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, scores, propagate_nan=tl.PropagateNan.ALL)
        # A lane that has seen nothing but -inf has a sum of 0, not exp(-inf + inf).
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.exp(scores - base)
        peak = higher
    highest = tl.max(peak, axis=0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    lse = base + tl.log(tl.sum(total * tl.exp(peak - base), axis=0))
    right = tl.load(logits_ptr + target, mask=valid, other=float("nan")).to(tl.float32)
    tl.store(lse_ptr + row, lse)
    tl.store(losses_ptr + row, tl.where(counted, lse - right, 0.0))

    if WITH_GRAD:
        # The logit of the target was read by every thread that will overwrite it.
        tl.debug_barrier()
        scale = tl.load(scale_ptr + row * scale_stride)
        scale = tl.where(valid, scale, float("nan"))
        for start in range(0, V, BLOCK):
            column = start + lane
            scores = tl.load(logits_ptr + column, mask=column < V, other=0.0).to(tl.float32)
            grad = (tl.exp(scores - lse) - tl.where(column == target, 1.0, 0.0)) * scale
            grad = tl.where(counted, grad, 0.0)
            tl.store(logits_ptr + column, grad.to(logits_ptr.dtype.element_ty), mask=column < V)


# Longest row -> (BLOCK, num_warps)
LAUNCH = {1024: (1024, 4), 8192: (2048, 8), 2**31: (4096, 16)}


def unsupported(call: LossCall) -> str | None:
    return hardware.triton_unsupported(call.x.device)


def chunk_loss(logits, targets, losses, lse, scale, ignore_index, with_grad) -> None:
    """See chunks.ChunkLoss."""
    launch = row_launch(logits, targets, losses, lse, scale, ignore_index, with_grad)
    with hardware.on_device(logits.device):
        launch(logits, targets, losses, lse, scale)


@remembered
def row_launch(logits, targets, losses, lse, scale, ignore_index, with_grad) -> Launch:
    """Of a chunk, whose rows start anywhere in targets, losses and lse"""
    rows, vocabulary = logits.shape
    block, warps = next(row for longest, row in LAUNCH.items() if vocabulary <= longest)
    scale_stride = 0 if scale.ndim == 0 else scale.stride(0)
    return Launch(
        cross_entropy_kernel,
        (rows,),
        (vocabulary, logits.stride(0), scale_stride, ignore_index),
        WITH_GRAD=with_grad,
        BLOCK=block,
        num_warps=warps,
    )


linear_cross_entropy_fwd, linear_cross_entropy_bwd = chunks.launchers(chunk_loss, __name__)
