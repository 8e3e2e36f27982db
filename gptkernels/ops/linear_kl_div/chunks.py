"""The distillation loss in chunks of rows: a few rows of the student's logits and of the teacher's at a time. Backends
differ in what they do to a chunk."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...torch_library import torch_op
from ..linear_cross_entropy.chunks import chunk_rows, logits_buffer
from ..products import add_product
from .record import DistillCall


class Chunk(NamedTuple):
    """Some rows of a call: losses are filled, logits become their gradient where that is asked for."""

    logits: Tensor  # (R, V) of the student
    teacher: Tensor  # (R, V)
    counts: Tensor  # (R,) float32: 0 of an ignored row, else 1
    losses: Tensor  # (R,) float32
    scale: Tensor  # () or (R,) float32: what the loss of each row counts for in the gradient


class Options(NamedTuple):
    temperature: float
    with_grad: bool


ChunkLoss = Callable[[Chunk, Options], None]


def empty_grads(call: DistillCall, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    """Of x, and in float32 of weight"""
    x, weight = call.x, call.weight
    grad_x = torch.empty(x.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
    return grad_x, torch.empty(weight.shape if needs_weight else (0,), dtype=torch.float32, device=x.device)


def fwd_outputs(call: DistillCall, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> loss: () or (M,) float32, gradients for a gradient of 1 of it; with reduction="none" none yet"""
    now = call.reduction != "none"
    loss = torch.empty(() if now else call.x.shape[:1], dtype=torch.float32, device=call.x.device)
    return loss, *empty_grads(call, now and needs_x, now and needs_weight)


def bwd_outputs(
    call: DistillCall, dloss: Tensor, needs_x: bool, needs_weight: bool, float_weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """dloss: (M,) -> gradients of x: (M, d) and weight: (V, d)"""
    grad_x, grad_weight = empty_grads(call, needs_x, needs_weight)
    return grad_x, grad_weight if float_weight_grad else grad_weight.to(call.weight.dtype)


def counts_of(call: DistillCall) -> Tensor:
    """-> (M,) float32"""
    if call.targets is None:
        return torch.ones(call.x.shape[:1], dtype=torch.float32, device=call.x.device)
    return (call.targets != call.ignore_index).float()


def over_chunks(
    chunk_loss: ChunkLoss, call: DistillCall, counts: Tensor, scale: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> losses: (M,) float32, gradients of sum(losses * scale) of x: (M, d) and, in float32, weight: (V, d)"""
    x, tokens = call.x, call.vocabulary
    weight, teacher_weight = call.weight[:tokens], call.teacher_weight[:tokens]
    losses = torch.empty_like(counts)
    grad_x, weight_sum = empty_grads(call, needs_x, needs_weight)
    weight_sum[tokens if x.shape[0] else 0 :].zero_()
    step = chunk_rows(x.shape[0])
    buffer, teacher_buffer = (logits_buffer(step, tokens, each) for each in (x, call.teacher_x))
    options = Options(call.temperature, needs_x or needs_weight)
    for start in range(0, x.shape[0], step):
        rows = slice(start, min(start + step, x.shape[0]))
        count = rows.stop - start
        logits = torch.mm(x[rows], weight.mT, out=buffer[:count])
        teacher = torch.mm(call.teacher_x[rows], teacher_weight.mT, out=teacher_buffer[:count])
        row_scale = scale if scale.ndim == 0 else scale[rows]
        chunk_loss(Chunk(logits, teacher, counts[rows], losses[rows], row_scale), options)
        if needs_x:
            torch.mm(logits, weight, out=grad_x[rows])
        if needs_weight:
            add_product(weight_sum[:tokens], logits.mT, x[rows], first=start == 0)
    return losses, grad_x, weight_sum


def launchers(chunk_loss: ChunkLoss, module: str) -> tuple[Callable, Callable]:
    """-> a backend's linear_kl_div_fwd and linear_kl_div_bwd. module: its __name__"""

    def linear_kl_div_fwd(call: DistillCall, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
        """-> loss, gradients of x and weight"""
        now, counts = call.reduction != "none", counts_of(call)
        scale = 1 / counts.sum() if call.reduction == "mean" else counts.new_ones(())
        needs = now and needs_x, now and needs_weight
        losses, *grads = over_chunks(chunk_loss, call, counts, scale, *needs)
        return (losses.sum() * scale if now else losses), grads[0], grads[1]

    def linear_kl_div_bwd(
        call: DistillCall, dloss: Tensor, needs_x: bool, needs_weight: bool, float_weight_grad: bool
    ) -> tuple[Tensor, Tensor]:
        """dloss: (M,) -> gradients of x: (M, d) and weight: (V, d); the logits are computed again"""
        _, grad_x, grad_weight = over_chunks(chunk_loss, call, counts_of(call), dloss, needs_x, needs_weight)
        return grad_x, grad_weight if float_weight_grad else grad_weight.to(call.weight.dtype)

    # torch_op names the backend's ops after its module.
    for launcher in (linear_kl_div_fwd, linear_kl_div_bwd):
        launcher.__module__ = module
    return torch_op(fake=fwd_outputs)(linear_kl_div_fwd), torch_op(fake=bwd_outputs)(linear_kl_div_bwd)
