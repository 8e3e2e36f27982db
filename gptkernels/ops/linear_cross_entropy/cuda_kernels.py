"""The chunked loss with one CUDA C++ kernel over a chunk's rows (csrc/cross_entropy); the products are cuBLAS's."""

from torch import Tensor

from ... import cuda_library
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


linear_cross_entropy_fwd, linear_cross_entropy_bwd = chunks.launchers(chunk_loss, __name__)
