"""The loss in chunks of rows, so that the logits never exist as a whole. Backends differ in what they do to a chunk."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..products import add_product

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


def chunk_rows(rows: int) -> int:
    return min(max(rows, 1), max(MIN_ROWS, -(-rows // CHUNKS)))


def fwd_outputs(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    needs_x: bool,
    needs_weight: bool,
    float_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x: (M, d), weight: (V, d), targets: (M,) -> loss: () or (M,), lse: (M,) float32, gradients of x and weight for a
    gradient of 1 of the loss; with reduction="none", which has a gradient for each row, none yet"""
    now = reduction != "none"
    rows = x.shape[0]
    loss = torch.empty(() if now else (rows,), dtype=torch.float32, device=x.device)
    lse = torch.empty((rows,), dtype=torch.float32, device=x.device)
    grad_x = torch.empty(x.shape if now and needs_x else (0,), dtype=x.dtype, device=x.device)
    weight_dtype = torch.float32 if float_weight_grad else weight.dtype
    grad_weight = torch.empty(weight.shape if now and needs_weight else (0,), dtype=weight_dtype, device=x.device)
    return loss, lse, grad_x, grad_weight


def bwd_outputs(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    needs_x: bool,
    needs_weight: bool,
    float_weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """dloss, lse: (M,) -> gradients of x: (M, d) and weight: (V, d)"""
    return fwd_outputs(x, weight, targets, ignore_index, "sum", needs_x, needs_weight, float_weight_grad)[2:]


def forward(
    chunk_loss: ChunkLoss, x, weight, targets, ignore_index, reduction, needs_x, needs_weight, float_weight_grad
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What every backend's linear_cross_entropy_fwd returns."""
    counted = (targets != ignore_index).sum()
    scale = torch.ones((), device=x.device)
    if reduction == "mean":
        scale = scale / counted
    if reduction == "none":
        needs_x = needs_weight = False
    losses, lse, grad_x, grad_weight = over_chunks(
        chunk_loss, x, weight, targets, scale, ignore_index, needs_x, needs_weight, float_weight_grad
    )
    if reduction != "none":
        losses = losses.sum() * scale
    return losses, lse, grad_x, grad_weight


def over_chunks(
    chunk_loss: ChunkLoss, x, weight, targets, scale, ignore_index, needs_x, needs_weight, float_weight_grad
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> losses, lse: (M,) float32, gradients of sum(losses * scale) of x: (M, d) and weight: (V, d)"""
    losses, lse = (torch.empty((x.shape[0],), dtype=torch.float32, device=x.device) for _ in range(2))
    grad_x = torch.empty(x.shape if needs_x else (0,), dtype=x.dtype, device=x.device)
    weight_sum = torch.zeros(weight.shape if needs_weight else (0,), dtype=torch.float32, device=x.device)
    step = chunk_rows(x.shape[0])
    # Rows start at multiples of 16 bytes, for the vocabularies that are divisible by nothing.
    padded = -(-weight.shape[0] // ROW_ELEMENTS) * ROW_ELEMENTS
    buffer = torch.empty((step, padded), dtype=x.dtype, device=x.device)[:, : weight.shape[0]]
    for start in range(0, x.shape[0], step):
        rows = slice(start, min(start + step, x.shape[0]))
        logits = torch.mm(x[rows], weight.mT, out=buffer[: rows.stop - start])
        row_scale = scale if scale.ndim == 0 else scale[rows]
        chunk_loss(logits, targets[rows], losses[rows], lse[rows], row_scale, ignore_index, needs_x or needs_weight)
        if needs_x:
            torch.mm(logits, weight, out=grad_x[rows])
        if needs_weight:
            add_product(weight_sum, logits.mT, x[rows])
    dtype = torch.float32 if float_weight_grad else weight.dtype
    return losses, lse, grad_x, weight_sum.to(dtype)
