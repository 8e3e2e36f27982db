"""The chunked loss with one CUDA C++ kernel over a chunk's rows (csrc/cross_entropy); the products are cuBLAS's."""

from torch import Tensor

from ... import cuda_library
from ...torch_library import torch_op
from . import chunks


def unsupported(x: Tensor, weight: Tensor) -> str | None:
    return cuda_library.unsupported(x.device)


def chunk_loss(logits, targets, losses, lse, scale, ignore_index, with_grad) -> None:
    """See chunks.ChunkLoss."""
    cuda_library.launch(
        "cross_entropy",
        logits,
        targets,
        losses,
        lse,
        scale,
        logits.shape[0],
        logits.stride(0),
        0 if scale.ndim == 0 else scale.stride(0),
        ignore_index,
        logits.shape[1],
        cuda_library.DTYPE[logits.dtype],
        with_grad,
    )


@torch_op(fake=chunks.fwd_outputs)
def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    reduction: str,
    needs_x: bool,
    needs_weight: bool,
    float_weight_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x: (M, d), weight: (V, d), targets: (M,) -> loss, lse: (M,), gradients of x and weight"""
    return chunks.forward(
        chunk_loss, x, weight, targets, ignore_index, reduction, needs_x, needs_weight, float_weight_grad
    )


@torch_op(fake=chunks.bwd_outputs)
def linear_cross_entropy_bwd(
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
    """dloss, lse: (M,) -> gradients of x: (M, d) and weight: (V, d); the logits are computed again"""
    return chunks.over_chunks(
        chunk_loss, x, weight, targets, dloss, ignore_index, needs_x, needs_weight, float_weight_grad
    )[2:]
