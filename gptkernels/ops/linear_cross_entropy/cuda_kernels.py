"""The chunked loss with one CUDA C++ kernel over a chunk's rows (csrc/cross_entropy); the products are cuBLAS's."""

from ... import cuda_library
from ...remembered import remembered
from . import chunks
from .record import LossCall


def unsupported(call: LossCall) -> str | None:
    return cuda_library.unsupported(call.x.device)


def chunk_loss(logits, targets, losses, lse, scale, ignore_index, with_grad) -> None:
    """See chunks.ChunkLoss."""
    row_launch(logits, scale, ignore_index, with_grad)(logits, targets, losses, lse, scale)


@remembered
def row_launch(logits, scale, ignore_index, with_grad) -> cuda_library.Launch:
    rows, vocabulary = logits.shape
    numbers = {
        "rows": rows,
        "stride": logits.stride(0),
        "scale_stride": 0 if scale.ndim == 0 else scale.stride(0),
        "ignore_index": ignore_index,
        "vocabulary": vocabulary,
        "dtype": cuda_library.DTYPE[logits.dtype],
        "with_grad": with_grad,
    }
    tensors = ("logits", "targets", "losses", "lse", "scale")
    return cuda_library.Launch("cross_entropy", logits.device, tensors, numbers)


linear_cross_entropy_fwd, linear_cross_entropy_bwd = chunks.launchers(chunk_loss, __name__)
