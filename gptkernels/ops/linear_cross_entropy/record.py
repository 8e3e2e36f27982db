"""What a call of the loss travels as, from the op to the kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...records import Record


@dataclass(slots=True, eq=False)
class LossCall(Record):
    """As linear_cross_entropy takes it, in rows."""

    x: Tensor  # (M, d)
    weight: Tensor  # (V, d)
    targets: Tensor  # (M,) int64
    ignore_index: int
    reduction: str
    dtype: torch.dtype  # of the products: kernels get x and weight in it

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        rows, columns = self.x.shape
        return (), {"M": rows, "N": columns, "V": self.weight.shape[0]}
