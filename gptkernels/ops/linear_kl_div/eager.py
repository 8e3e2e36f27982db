"""The chunked distillation loss with PyTorch's own kernels: every device and dtype."""

from torch import Tensor

from . import chunks
from .chunks import Chunk, Options


def unsupported(*_) -> str | None:
    return None


def chunk_loss(chunk: Chunk, options: Options) -> None:
    """See chunks.Chunk."""
    logits, teacher, counts, losses, scale = chunk
    student, expected = (log_probs(each, options.temperature) for each in (logits, teacher))
    probabilities = expected.exp()
    counted = counts != 0
    terms = expected.sub_(student).mul_(probabilities)
    # What the teacher gives no probability costs nothing, however little the student gives it. A CPU knows whether any
    # of it is 0 * Inf; a GPU would have to be waited for.
    if not terms.is_cpu or terms.sum(1).isnan().any():
        terms.masked_fill_(probabilities == 0, 0)
    losses.copy_(terms.sum(1)).masked_fill_(~counted, 0)
    if options.with_grad:
        grad = student.exp_().sub_(probabilities)
        grad.mul_((scale / options.temperature).expand(losses.shape).unsqueeze(1))
        if not terms.is_cpu or not counted.all():
            grad.masked_fill_(~counted.unsqueeze(1), 0)
        logits.copy_(grad)


def log_probs(logits: Tensor, temperature: float) -> Tensor:
    """(R, V) -> (R, V) float32, a new tensor"""
    scores = logits.float()
    return (scores if temperature == 1 else scores / temperature).log_softmax(1)


linear_kl_div_fwd, linear_kl_div_bwd = chunks.launchers(chunk_loss, __name__)
