"""What a call of RMSNorm travels as, from the op to the kernels."""

from dataclasses import dataclass

from torch import Tensor

from ...records import Record


@dataclass(slots=True, eq=False)
class RMSNormCall(Record):
    """As rms_norm and add_rms_norm take it, in rows that are evenly spaced, or in groups of such rows."""

    x: Tensor  # (M, N) or (G, R, N); in the backward pass what was normalised: x or h
    residual: Tensor | None  # (M, N); not in the backward pass
    weight: Tensor | None  # (N,)
    seed: Tensor | None  # (1,) int64, drawn in the forward pass where there is dropout
    eps: float
    offset: float
    cast_first: bool  # the normalised row is rounded to x's dtype before the product with the weight too
    dropout: float

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        return (), {"M": self.x.shape[:-1].numel(), "N": self.x.shape[-1]}
