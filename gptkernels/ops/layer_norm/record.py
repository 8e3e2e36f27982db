"""What a call of LayerNorm travels as, from the op to the kernels."""

from dataclasses import dataclass

from torch import Tensor

from ...records import Record


@dataclass(slots=True, eq=False)
class LayerNormCall(Record):
    """As layer_norm and add_layer_norm take it, in rows that are evenly spaced."""

    x: Tensor  # (M, N); in the backward pass what was normalised: x or h
    residual: Tensor | None  # (M, N); not in the backward pass
    weight: Tensor  # (N,)
    bias: Tensor | None  # (N,); not in the backward pass
    seed: Tensor | None  # (1,) int64, drawn in the forward pass where there is dropout
    eps: float
    dropout: float

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        rows, columns = self.x.shape
        return (), {"M": rows, "N": columns}
