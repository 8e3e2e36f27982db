"""What a call of a norm travels as, from the op to the kernels."""

from dataclasses import dataclass

from torch import Tensor

from ...records import Record


@dataclass(slots=True, eq=False)
class NormCall(Record):
    """As layer_norm and add_layer_norm take it, in rows that are evenly spaced."""

    x: Tensor  # (M, N)
    residual: Tensor | None  # (M, N)
    weight: Tensor  # (N,)
    bias: Tensor | None  # (N,)
    eps: float
    dropout: float

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        rows, columns = self.x.shape
        return (), {"M": rows, "N": columns}
