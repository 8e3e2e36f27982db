"""What a call of the MLP travels as, from the op to the kernels."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...records import Record


@dataclass(slots=True, eq=False)
class MlpCall(Record):
    """As mlp takes it, in rows that are evenly spaced."""

    OP: ClassVar[str] = "mlp"

    x: Tensor  # (M, d)
    fc_weight: Tensor  # (hidden, d), or a view of (d, hidden)
    fc_bias: Tensor | None  # (hidden,)
    proj_weight: Tensor  # (d_out, hidden), or a view of (hidden, d_out)
    proj_bias: Tensor | None  # (d_out,)
    residual: Tensor | None  # (M, d_out); neither this nor proj_bias is there in the backward pass
    activation: str
    save: str

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        rows, columns = self.x.shape
        return (), {"M": rows, "N": columns, "F": self.fc_weight.shape[0]}
