"""The chunked loss with one CUDA C++ kernel over a chunk's rows (csrc/cross_entropy); the products are cuBLAS's."""

from torch import Tensor

from ... import cuda_library
from . import chunks


def unsupported(x: Tensor, *_) -> str | None:
    return cuda_library.unsupported(x.device)


def chunk_loss(logits, targets, losses, lse, scale, ignore_index, with_grad) -> None:
    """See chunks.ChunkLoss."""
    rows, vocabulary = logits.shape
    fields = {
        "logits": logits,
        "targets": targets,
        "losses": losses,
        "lse": lse,
        "scale": scale,
        "rows": rows,
        "stride": logits.stride(0),
        "scale_stride": 0 if scale.ndim == 0 else scale.stride(0),
        "ignore_index": ignore_index,
        "vocabulary": vocabulary,
        "dtype": cuda_library.DTYPE[logits.dtype],
        "with_grad": with_grad,
    }
    cuda_library.launch("cross_entropy", logits.device, fields)


linear_cross_entropy_fwd, linear_cross_entropy_bwd = chunks.launchers(chunk_loss, __name__)
