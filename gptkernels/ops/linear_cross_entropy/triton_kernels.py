"""The chunked loss with one Triton kernel over the rows of a chunk; the products are cuBLAS's."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ... import hardware
from ...remembered import remembered
from ...triton_calls import Launch
from . import chunks
from .chunks import Chunk, Options
from .record import LossCall


@triton.jit
def scores_of(
    logits, bias_ptr, column, V, softcap, temperature, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, WARM: tl.constexpr
):
    """logits: (BLOCK,) at `column`, or one -> scores, and tanh of the softcap where there is one"""
    scores = logits.to(tl.float32)
    if HAS_BIAS:
        scores += tl.load(bias_ptr + column, mask=(column >= 0) & (column < V), other=0.0)
    capped = scores
    if CAPPED:
        capped = libdevice.tanh(scores / softcap)
        scores = softcap * capped
    if WARM:
        scores /= temperature
    return scores, capped


@triton.jit
def seen(peak, total, scores):
    """A running maximum and sum of exponentials: (BLOCK,) each, with scores: (BLOCK,)"""
    higher = tl.maximum(peak, scores, propagate_nan=tl.PropagateNan.ALL)
    # A lane that has seen nothing but -inf has a sum of 0, not exp(-inf + inf).
    base = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, total * tl.exp(peak - base) + tl.exp(scores - base)


@triton.jit
def log_sum(peak, total):
    """(BLOCK,) each -> ()"""
    highest = tl.max(peak, axis=0)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    return base + tl.log(tl.sum(total * tl.exp(peak - base), axis=0))


@triton.jit
def cross_entropy_kernel(
    logits_ptr,  # (R, V), rows stride apart; replaced by their gradient if WITH_GRAD
    targets_ptr,  # (R,) int64
    losses_ptr,  # (R,) float32
    lse_ptr,  # (R,) float32
    scale_ptr,  # () or (R,) float32
    bias_ptr,  # (V,) float32 or unused
    class_weight_ptr,  # (V,) float32 or unused
    factors_ptr,  # (2,) float32 or unused: see chunks.Options
    V,
    stride,
    scale_stride,
    ignore_index,
    label_smoothing,
    softcap,
    temperature,
    WITH_GRAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLASS_WEIGHT: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
    WARM: tl.constexpr,
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
    weighted = tl.zeros((BLOCK,), dtype=tl.float32)  # class weights times scores
    for start in range(0, V, BLOCK):
        column = start + lane
        logits = tl.load(logits_ptr + column, mask=column < V, other=float("-inf"))
        scores, _ = scores_of(logits, bias_ptr, column, V, softcap, temperature, HAS_BIAS, CAPPED, WARM)
        if CAPPED:  # of -inf, too, which here is the end of the row
            scores = tl.where(column < V, scores, float("-inf"))
        if SMOOTHED:
            present = tl.where(column < V, scores, 0.0)
            if HAS_CLASS_WEIGHT:
                present *= tl.load(class_weight_ptr + column, mask=column < V, other=0.0)
            weighted += present
        peak, total = seen(peak, total, scores)
    lse = log_sum(peak, total)
    of_target = tl.load(logits_ptr + target, mask=valid, other=float("nan"))
    right, _ = scores_of(of_target, bias_ptr, target, V, softcap, temperature, HAS_BIAS, CAPPED, WARM)
    loss = lse - right
    # What p, the target's one and the class weights count for in the gradient.
    of_all = 1.0
    of_right = 1.0
    if SMOOTHED:
        of_right = 1.0 - label_smoothing
    if HAS_CLASS_WEIGHT:
        of_right *= tl.load(class_weight_ptr + target, mask=valid, other=0.0)
    if HAS_FACTORS:
        mean_weight = tl.load(factors_ptr)
        loss *= of_right
        of_all = of_right + 2.0 * tl.load(factors_ptr + 1) * lse
        if SMOOTHED:
            loss += label_smoothing * (mean_weight * lse - tl.sum(weighted, axis=0) / V)
            of_all += label_smoothing * mean_weight
    tl.store(lse_ptr + row, lse)
    tl.store(losses_ptr + row, tl.where(counted, loss, 0.0))

    if WITH_GRAD:
        # The logit of the target was read by every thread that will overwrite it.
        tl.debug_barrier()
        scale = tl.load(scale_ptr + row * scale_stride)
        scale = tl.where(valid, scale, float("nan"))
        if WARM:
            scale /= temperature
        for start in range(0, V, BLOCK):
            column = start + lane
            logits = tl.load(logits_ptr + column, mask=column < V, other=0.0)
            scores, capped = scores_of(logits, bias_ptr, column, V, softcap, temperature, HAS_BIAS, CAPPED, WARM)
            grad = of_all * tl.exp(scores - lse) - tl.where(column == target, of_right, 0.0)
            if SMOOTHED:
                share = label_smoothing / V
                if HAS_CLASS_WEIGHT:
                    share *= tl.load(class_weight_ptr + column, mask=column < V, other=0.0)
                grad -= share
            if CAPPED:
                grad *= 1.0 - capped * capped
            grad = tl.where(counted, grad * scale, 0.0)
            tl.store(logits_ptr + column, grad.to(logits_ptr.dtype.element_ty), mask=column < V)


# Longest row -> (BLOCK, num_warps)
LAUNCH = {1024: (1024, 4), 8192: (2048, 8), 2**31: (4096, 16)}


def unsupported(call: LossCall) -> str | None:
    return hardware.triton_unsupported(call.x.device)


def chunk_loss(chunk: Chunk, options: Options) -> None:
    """See chunks.Chunk and Options."""
    launch = row_launch(*chunk, *options)
    with hardware.on_device(chunk.logits.device):
        launch(*chunk, *(chunk.lse if x is None else x for x in (options.bias, options.class_weight, options.factors)))


@remembered
def row_launch(logits, targets, losses, lse, scale, *options) -> Launch:
    """Of a chunk, whose rows start anywhere in targets, losses and lse"""
    made = Options(*options)
    rows, vocabulary = logits.shape
    block, warps = next(row for longest, row in LAUNCH.items() if vocabulary <= longest)
    scale_stride = 0 if scale.ndim == 0 else scale.stride(0)
    numbers = made.ignore_index, made.label_smoothing, made.softcap, made.temperature
    return Launch(
        cross_entropy_kernel,
        (rows,),
        (vocabulary, logits.stride(0), scale_stride, *numbers),
        WITH_GRAD=made.with_grad,
        HAS_BIAS=made.bias is not None,
        HAS_CLASS_WEIGHT=made.class_weight is not None,
        HAS_FACTORS=made.factors is not None,
        SMOOTHED=made.label_smoothing > 0,
        CAPPED=made.softcap > 0,
        WARM=made.temperature != 1,
        BLOCK=block,
        num_warps=warps,
    )


linear_cross_entropy_fwd, linear_cross_entropy_bwd = chunks.launchers(chunk_loss, __name__)
