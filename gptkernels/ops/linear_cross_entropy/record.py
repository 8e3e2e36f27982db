"""What calls of the loss travel as, from the ops to the kernels."""

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
    bias: Tensor | None = None  # (V,); kernels get it in float32
    class_weight: Tensor | None = None  # (V,) float32
    ignore_index: int = -100
    reduction: str = "mean"
    dtype: torch.dtype = torch.float32  # of the products: kernels get x and weight in it
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0  # 0: none
    temperature: float = 1.0

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        rows, columns = self.x.shape
        return (), {"M": rows, "N": columns, "V": self.weight.shape[0]}
