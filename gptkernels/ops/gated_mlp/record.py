"""What a call of the gated MLP travels as, from the op to the kernels."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...records import Record


@dataclass(slots=True, eq=False)
class GatedMlpCall(Record):
    """As gated_mlp takes it, in rows that are evenly spaced."""

    OP: ClassVar[str] = "gated_mlp"

    x: Tensor  # (M, d)
    gate_weight: Tensor  # (hidden, d), rows as far apart as those of a packed matrix are
    up_weight: Tensor  # likewise
    gate_bias: Tensor | None  # (hidden,)
    up_bias: Tensor | None  # (hidden,)
    down_weight: Tensor  # (d_out, hidden), contiguous
    down_bias: Tensor | None  # (d_out,)
    residual: Tensor | None  # (M, d_out); neither this nor down_bias is there in the backward pass
    activation: str
    save: str

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        rows, columns = self.x.shape
        return (), {"M": rows, "N": columns, "F": self.gate_weight.shape[0]}
