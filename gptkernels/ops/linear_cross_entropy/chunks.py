"""The loss in chunks of rows, so that the logits never exist as a whole. Backends differ in what they do to a chunk."""

import os
from collections.abc import Callable
from typing import NamedTuple, Protocol

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


class Chunk(NamedTuple):
    """Some rows of a call, and what a backend makes of them: losses and lse are filled, logits become their gradient
    where that is asked for."""

    logits: Tensor  # (R, V) x @ weight.mT
    targets: Tensor  # (R,) int64
    losses: Tensor  # (R,) float32, without what z_loss adds
    lse: Tensor  # (R,) float32
    scale: Tensor  # () or (R,) float32: what the loss of each row counts for in the gradient


class Options(NamedTuple):
    """What is the same for all chunks of a call.

    The scores of a row are softcap * tanh((logits + bias) / softcap) / temperature, each part where there is one; with
    w = class_weight, or 1, its loss is
        (1 - label_smoothing) w[target] (lse - scores[target]) + label_smoothing mean(w (lse - scores)).
    """

    ignore_index: int
    with_grad: bool
    bias: Tensor | None  # (V,) float32
    class_weight: Tensor | None  # (V,) float32
    factors: Tensor | None  # (2,) float32: the mean of w, and what lse^2 counts for beside the loss; None: 1, 0
    label_smoothing: float
    softcap: float
    temperature: float

    @property
    def plain(self) -> bool:
        """Whether it is the cross-entropy of the logits, no more"""
        return self.bias is None and self.factors is None and not self.softcap and self.temperature == 1


class Part(Protocol):
    """Of a vocabulary that several processes have between them: this one's columns, from `first` on, of `whole`."""

    first: int
    whole: int

    def highest(self, peak: Tensor) -> Tensor:
        """(R,) of this part's columns -> of all"""
        ...

    def summed(self, *sums: Tensor) -> tuple[Tensor, ...]:
        """(R,) each, of this part's columns -> of all"""
        ...


ChunkLoss = Callable[[Chunk, Options], None]


def chunk_rows(rows: int, fewest: int = MIN_ROWS) -> int:
    """Of chunks of the same size, as far as they can be"""
    chunks = max(1, min(CHUNKS, rows // fewest))
    return max(1, -(-rows // chunks))


def logits_buffer(rows: int, vocabulary: int, x: Tensor) -> Tensor:
    """-> (rows, vocabulary) like x, to be filled"""
    # Rows start at multiples of 16 bytes, for the vocabularies that are divisible by nothing.
    padded = -(-vocabulary // ROW_ELEMENTS) * ROW_ELEMENTS
    buffer = torch.empty((rows, padded), dtype=x.dtype, device=x.device)
    if buffer.is_cpu:
        # oneDNN multiplies bfloat16 in pairs: beside the last of an odd vocabulary it reads the padding, times 0.
        buffer[:, vocabulary:] = 0
    return buffer[:, :vocabulary]


@remembered
def fewest_rows(call: LossCall) -> int:
    return choices.setting("loss_rows", "linear_cross_entropy", call, MIN_ROWS)


class Needs(NamedTuple):
    """Which gradients are asked for"""

    x: bool
    weight: bool
    bias: bool


Grads = tuple[Tensor, Tensor, Tensor]


def fwd_outputs(
    call: LossCall, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> loss: () or (M,), what z_loss adds to it, lse: (M,) float32, gradients of x, weight and bias (float32) for a
    gradient of 1 of the loss; with reduction="none", which has a gradient for each row, none yet"""
    x, now = call.x, call.reduction != "none"
    loss, z = (torch.empty(() if now else x.shape[:1], dtype=torch.float32, device=x.device) for _ in range(2))
    lse = torch.empty(x.shape[:1], dtype=torch.float32, device=x.device)
    needs = Needs(*(now and needed for needed in (needs_x, needs_weight, needs_bias)))
    return loss, z if call.z_loss else z.new_empty(0), lse, *empty_grads(call, needs)


def empty_grads(call: LossCall, needs: Needs) -> Grads:
    x, weight = call.x, call.weight

    def empty(needed: bool, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if needed else (0,), dtype=dtype, device=x.device)

    grad_x = empty(needs.x, x.shape, x.dtype)
    return grad_x, empty(needs.weight, weight.shape, torch.float32), empty(needs.bias, weight.shape[:1], torch.float32)


def bwd_outputs(
    call: LossCall,
    dloss: Tensor,
    lse: Tensor,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
    float_weight_grad: bool,
) -> Grads:
    """dloss, lse: (M,) -> gradients of x: (M, d), weight: (V, d) and bias: (V,)"""
    grad_x, grad_weight, grad_bias = empty_grads(call, Needs(needs_x, needs_weight, needs_bias))
    return grad_x, grad_weight if float_weight_grad else grad_weight.to(call.weight.dtype), grad_bias


def over_chunks(
    chunk_loss: ChunkLoss, call: LossCall, scale: Tensor, factors: Tensor | None, needs: Needs
) -> tuple[Tensor, Tensor, Grads]:
    """-> losses, lse: (M,) float32, gradients of sum(losses * scale) of x: (M, d) and, in float32, weight: (V, d) and
    bias: (V,)"""
    x, weight, targets = call.x, call.weight, call.targets
    losses, lse = (torch.empty((x.shape[0],), dtype=torch.float32, device=x.device) for _ in range(2))
    grad_x, weight_sum, bias_sum = empty_grads(call, needs)
    bias_sum.zero_()
    if not x.shape[0]:
        weight_sum.zero_()
    step = chunk_rows(x.shape[0], fewest_rows(call))
    buffer = logits_buffer(step, weight.shape[0], x)
    options = Options(
        call.ignore_index,
        any(needs),
        call.bias,
        call.class_weight,
        factors,
        call.label_smoothing,
        call.softcap,
        call.temperature,
    )
    for start in range(0, x.shape[0], step):
        rows = slice(start, min(start + step, x.shape[0]))
        logits = torch.mm(x[rows], weight.mT, out=buffer[: rows.stop - start])
        row_scale = scale if scale.ndim == 0 else scale[rows]
        chunk_loss(Chunk(logits, targets[rows], losses[rows], lse[rows], row_scale), options)
        if needs.x:
            torch.mm(logits, weight, out=grad_x[rows])
        if needs.weight:
            add_product(weight_sum, logits.mT, x[rows], first=start == 0)
        if needs.bias:
            bias_sum += logits.sum(0, dtype=torch.float32)
    return losses, lse, (grad_x, weight_sum, bias_sum)


def check_range(targets: Tensor, vocabulary: int, ignore_index: int) -> None:
    """In the launcher, where torch.compile has tensors with values too."""
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        raise ValueError(
            f"targets must be 0 ... {vocabulary - 1} or ignore_index ({ignore_index}), not {targets[wrong][0].item()}"
        )


def scales(call: LossCall) -> tuple[Tensor, Tensor]:
    """-> (), (): what the loss of a row, and what z_loss adds to it, count for in the loss of all"""
    one = torch.ones((), device=call.x.device)
    if call.reduction != "mean":
        return one, one
    counted = call.targets != call.ignore_index
    of_row = one / counted.sum()
    if call.class_weight is None:
        return of_row, of_row
    vocabulary = call.weight.shape[0]
    valid = (call.targets >= 0) & (call.targets < vocabulary)
    weights = call.class_weight[call.targets.where(valid, 0)].masked_fill(~counted, 0)
    return one / weights.sum(), of_row


def factors_of(call: LossCall, scale: Tensor, z_scale: Tensor) -> Tensor | None:
    """-> Options.factors"""
    if call.class_weight is None and not call.label_smoothing and not call.z_loss:
        return None
    mean = torch.ones_like(scale) if call.class_weight is None else call.class_weight.mean()
    return torch.stack((mean, call.z_loss * (z_scale / scale)))


def computations(chunk_loss: ChunkLoss, part: Part | None = None) -> tuple[Callable, Callable]:
    """-> linear_cross_entropy_fwd and linear_cross_entropy_bwd. part: of the vocabulary, where calls have no more"""

    def linear_cross_entropy_fwd(
        call: LossCall, needs_x: bool, needs_weight: bool, needs_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """-> loss, what z_loss adds to it, lse: (M,), gradients of x, weight and bias"""
        if call.targets.is_cpu or os.environ.get("GPTKERNELS_CHECKED") == "1":
            check_range(call.targets, call.weight.shape[0] if part is None else part.whole, call.ignore_index)
        scale, z_scale = scales(call)
        now = call.reduction != "none"
        needs = Needs(*(now and needed for needed in (needs_x, needs_weight, needs_bias)))
        losses, lse, grads = over_chunks(chunk_loss, call, scale, factors_of(call, scale, z_scale), needs)
        if now:
            losses = losses.sum() * scale
        z = losses.new_empty(0)
        if call.z_loss:
            z = (call.z_loss * lse.square()).masked_fill(call.targets == call.ignore_index, 0)
            z = z.sum() * z_scale if now else z
            losses = losses + z
        return losses, z, lse, *grads

    def linear_cross_entropy_bwd(
        call: LossCall,
        dloss: Tensor,
        lse: Tensor,
        needs_x: bool,
        needs_weight: bool,
        needs_bias: bool,
        float_weight_grad: bool,
    ) -> Grads:
        """dloss, lse: (M,) -> gradients of x: (M, d), weight: (V, d) and bias: (V,); the logits are computed again"""
        needs = Needs(needs_x, needs_weight, needs_bias)
        factors = factors_of(call, *scales(call))
        grad_x, grad_weight, grad_bias = over_chunks(chunk_loss, call, dloss, factors, needs)[2]
        return grad_x, grad_weight if float_weight_grad else grad_weight.to(call.weight.dtype), grad_bias

    return linear_cross_entropy_fwd, linear_cross_entropy_bwd


def launchers(chunk_loss: ChunkLoss, module: str) -> tuple[Callable, Callable]:
    """-> a backend's linear_cross_entropy_fwd and linear_cross_entropy_bwd. module: its __name__"""
    fwd, bwd = computations(chunk_loss)
    # torch_op names the backend's ops after its module.
    for launcher in (fwd, bwd):
        launcher.__module__ = module
    return torch_op(fake=fwd_outputs)(fwd), torch_op(fake=bwd_outputs)(bwd)
