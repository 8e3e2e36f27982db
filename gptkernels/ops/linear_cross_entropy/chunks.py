"""The loss in chunks of rows, so that the logits never exist as a whole. Backends differ in what they do to a chunk."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ...remembered import remembered
from ...torch_library import torch_op
from ...tuning import choices
from ..products import add_product
from .record import LossCall

# A chunk's logits are this share of the whole: at most 1/16 with room for a second buffer of the same size.
CHUNKS = 32
# Below this many rows a chunk's products are too small to be efficient, and its logits too small to matter: each adds
# to all of the weight's gradient, which costs as much as a product of about 50 rows.
MIN_ROWS = 112
ROW_ELEMENTS = 8

# A backend's work on one chunk: (logits, targets, losses, lse, scale, ignore_index, with_grad). logits: (R, V) are
# replaced by d loss / d logits if with_grad; losses, lse: (R,) float32 are filled; targets: (R,) int64;
# scale: () or (R,) float32, what the loss of each row counts for in the gradient.
ChunkLoss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, bool], None]


def chunk_rows(rows: int, fewest: int = MIN_ROWS) -> int:
    """Of chunks of the same size, as far as they can be"""
    chunks = max(1, min(CHUNKS, rows // fewest))
    return max(1, -(-rows // chunks))


@remembered
def fewest_rows(call: LossCall) -> int:
    return choices.setting("loss_rows", "linear_cross_entropy", call, MIN_ROWS)


def fwd_outputs(call: LossCall, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> loss: () or (M,), lse: (M,) float32, gradients of x and weight (float32) for a gradient of 1 of the loss; with
    reduction="none", which has a gradient for each row, none yet"""
    x, now = call.x, call.reduction != "none"
    loss = torch.empty(() if now else x.shape[:1], dtype=torch.float32, device=x.device)
    lse = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)
    return loss, lse, *empty_grads(call, now and needs_x, now and needs_weight)


def empty_grads(call: LossCall, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    x, weight = call.x, call.weight
    grad_x = torch.empty(x.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
    return grad_x, torch.empty(weight.shape if needs_weight else (0,), dtype=torch.float32, device=x.device)


def bwd_outputs(
    call: LossCall, dloss: Tensor, lse: Tensor, needs_x: bool, needs_weight: bool, float_weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """dloss, lse: (M,) -> gradients of x: (M, d) and weight: (V, d)"""
    grad_x, grad_weight = empty_grads(call, needs_x, needs_weight)
    return grad_x, grad_weight if float_weight_grad else grad_weight.to(call.weight.dtype)


def over_chunks(
    chunk_loss: ChunkLoss, call: LossCall, scale: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> losses, lse: (M,) float32, gradients of sum(losses * scale) of x: (M, d) and, in float32,
    weight: (V, d)"""
    x, weight, targets = call.x, call.weight, call.targets
    losses, lse = (torch.empty((x.shape[0],), dtype=torch.float32, device=x.device) for _ in range(2))
    grad_x, weight_sum = empty_grads(call, needs_x, needs_weight)
    if not x.shape[0]:
        weight_sum.zero_()
    step = chunk_rows(x.shape[0], fewest_rows(call))
    # Rows start at multiples of 16 bytes, for the vocabularies that are divisible by nothing.
    padded = -(-weight.shape[0] // ROW_ELEMENTS) * ROW_ELEMENTS
    buffer = torch.empty((step, padded), dtype=x.dtype, device=x.device)
    if buffer.is_cpu:
        # oneDNN multiplies bfloat16 in pairs: beside the last of an odd vocabulary it reads the padding, times 0.
        buffer[:, weight.shape[0] :] = 0
    buffer = buffer[:, : weight.shape[0]]
    for start in range(0, x.shape[0], step):
        rows = slice(start, min(start + step, x.shape[0]))
        logits = torch.mm(x[rows], weight.mT, out=buffer[: rows.stop - start])
        row_scale = scale if scale.ndim == 0 else scale[rows]
        with_grad = needs_x or needs_weight
        chunk_loss(logits, targets[rows], losses[rows], lse[rows], row_scale, call.ignore_index, with_grad)
        if needs_x:
            torch.mm(logits, weight, out=grad_x[rows])
        if needs_weight:
            add_product(weight_sum, logits.mT, x[rows], first=start == 0)
    return losses, lse, grad_x, weight_sum


def check_range(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """In the launcher, where torch.compile has tensors with values too."""
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        raise ValueError(
            f"targets must be 0 ... {vocabulary - 1} or ignore_index ({ignore_index}), not {targets[wrong][0].item()}"
        )


def launchers(chunk_loss: ChunkLoss, module: str) -> tuple[Callable, Callable]:
    """-> a backend's linear_cross_entropy_fwd and linear_cross_entropy_bwd. module: its __name__"""

    def linear_cross_entropy_fwd(
        call: LossCall, needs_x: bool, needs_weight: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> loss, lse: (M,), gradients of x and weight"""
        if call.targets.is_cpu or os.environ.get("GPTKERNELS_CHECKED") == "1":
            check_range(call.targets, call.weight.shape[0], call.ignore_index)
        scale = torch.ones((), device=call.x.device)
        if call.reduction == "mean":
            scale = scale / (call.targets != call.ignore_index).sum()
        if call.reduction == "none":
            needs_x = needs_weight = False
        losses, lse, grad_x, grad_weight = over_chunks(chunk_loss, call, scale, needs_x, needs_weight)
        if call.reduction != "none":
            losses = losses.sum() * scale
        return losses, lse, grad_x, grad_weight

    def linear_cross_entropy_bwd(
        call: LossCall, dloss: Tensor, lse: Tensor, needs_x: bool, needs_weight: bool, float_weight_grad: bool
    ) -> tuple[Tensor, Tensor]:
        """dloss, lse: (M,) -> gradients of x: (M, d) and weight: (V, d); the logits are computed again"""
        _, _, grad_x, grad_weight = over_chunks(chunk_loss, call, dloss, needs_x, needs_weight)
        return grad_x, grad_weight if float_weight_grad else grad_weight.to(call.weight.dtype)

    # torch_op names the backend's ops after its module.
    for launcher in (linear_cross_entropy_fwd, linear_cross_entropy_bwd):
        launcher.__module__ = module
    return torch_op(fake=fwd_outputs)(linear_cross_entropy_fwd), torch_op(fake=bwd_outputs)(linear_cross_entropy_bwd)
