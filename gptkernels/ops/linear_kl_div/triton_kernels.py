"""The chunked distillation loss with one Triton kernel over the rows of a chunk; the products are cuBLAS's."""

import triton
import triton.language as tl

from ... import hardware
from ...remembered import remembered
from ...triton_calls import Launch
from ..linear_cross_entropy.triton_kernels import LAUNCH, log_sum, seen
from . import chunks
from .chunks import Chunk, Options
from .record import DistillCall


@triton.jit
def kl_div_kernel(
    logits_ptr,  # (R, V), rows stride apart; replaced by their gradient if WITH_GRAD
    teacher_ptr,  # (R, V), rows teacher_stride apart
    counts_ptr,  # (R,) float32
    losses_ptr,  # (R,) float32
    scale_ptr,  # () or (R,) float32
    V,
    stride,
    teacher_stride,
    scale_stride,
    temperature,
    WITH_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program: both log-sum-exps, then the loss, and the gradient over the student's logits."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    teacher_ptr += row * teacher_stride
    lane = tl.arange(0, BLOCK)
    low = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    none = tl.zeros((BLOCK,), dtype=tl.float32)
    peak, total, teacher_peak, teacher_total = low, none, low, none
    for start in range(0, V, BLOCK):
        column = start + lane
        scores = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32) / temperature
        peak, total = seen(peak, total, scores)
        scores = tl.load(teacher_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32) / temperature
        teacher_peak, teacher_total = seen(teacher_peak, teacher_total, scores)
    lse = log_sum(peak, total)
    teacher_lse = log_sum(teacher_peak, teacher_total)
    counted = tl.load(counts_ptr + row) != 0
    scale = tl.load(scale_ptr + row * scale_stride) / temperature
    loss = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, V, BLOCK):
        column = start + lane
        scores = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32) / temperature - lse
        expected = tl.load(teacher_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32) / temperature
        expected -= teacher_lse
        probability = tl.exp(expected)
        # What the teacher gives no probability costs nothing, however little the student gives it.
        loss += tl.where((probability == 0.0) | (column >= V), 0.0, probability * (expected - scores))
        if WITH_GRAD:
            grad = tl.where(counted, (tl.exp(scores) - probability) * scale, 0.0)
            tl.store(logits_ptr + column, grad.to(logits_ptr.dtype.element_ty), mask=column < V)
    tl.store(losses_ptr + row, tl.where(counted, tl.sum(loss, axis=0), 0.0))


def unsupported(call: DistillCall) -> str | None:
    return hardware.triton_unsupported(call.x.device)


def chunk_loss(chunk: Chunk, options: Options) -> None:
    """See chunks.Chunk."""
    launch = row_launch(*chunk, *options)
    with hardware.on_device(chunk.logits.device):
        launch(*chunk)


@remembered
def row_launch(logits, teacher, counts, losses, scale, temperature, with_grad) -> Launch:
    """Of a chunk, whose rows start anywhere in counts and losses"""
    rows, vocabulary = logits.shape
    block, warps = next(row for longest, row in LAUNCH.items() if vocabulary <= longest)
    strides = logits.stride(0), teacher.stride(0), 0 if scale.ndim == 0 else scale.stride(0)
    return Launch(
        kl_div_kernel,
        (rows,),
        (vocabulary, *strides, temperature),
        WITH_GRAD=with_grad,
        BLOCK=block,
        num_warps=warps,
    )


linear_kl_div_fwd, linear_kl_div_bwd = chunks.launchers(chunk_loss, __name__)
