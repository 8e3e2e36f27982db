"""The chunked loss with one CUDA C++ kernel over a chunk's rows (csrc/cross_entropy); the products are cuBLAS's."""

from ... import cuda_library
from ...remembered import remembered
from . import chunks
from .chunks import Chunk, Options
from .record import LossCall


def unsupported(call: LossCall) -> str | None:
    return cuda_library.unsupported(call.x.device)


def chunk_loss(chunk: Chunk, options: Options) -> None:
    """See chunks.Chunk and Options."""
    launch = row_launch(chunk.logits, chunk.scale, *options)
    launch(*chunk, options.bias, options.class_weight, options.factors)


@remembered
def row_launch(logits, scale, *options) -> cuda_library.Launch:
    made = Options(*options)
    rows, vocabulary = logits.shape
    numbers = {
        "rows": rows,
        "stride": logits.stride(0),
        "scale_stride": 0 if scale.ndim == 0 else scale.stride(0),
        "ignore_index": made.ignore_index,
        "vocabulary": vocabulary,
        "dtype": cuda_library.DTYPE[logits.dtype],
        "with_grad": made.with_grad,
        "plain": made.plain,
        "label_smoothing": made.label_smoothing,
        "softcap": made.softcap,
        "temperature": made.temperature,
    }
    tensors = (*Chunk._fields, "bias", "class_weight", "factors")
    return cuda_library.Launch("cross_entropy", logits.device, tensors, numbers)


linear_cross_entropy_fwd, linear_cross_entropy_bwd = chunks.launchers(chunk_loss, __name__)
