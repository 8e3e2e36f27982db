"""What calls of the distillation loss travel as, from the op to the kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...records import Record


@dataclass(slots=True, eq=False)
class DistillCall(Record):
    """As linear_kl_div takes it, in rows. Kernels get the tensors in their dtypes, and weights of `vocabulary` rows."""

    x: Tensor  # (M, d)
    weight: Tensor  # (V, d)
    teacher_x: Tensor  # (M, e)
    teacher_weight: Tensor  # (W, e)
    targets: Tensor | None = None  # (M,) int64
    ignore_index: int = -100
    reduction: str = "mean"
    temperature: float = 1.0
    vocabulary: int = 0
    dtype: torch.dtype = torch.float32  # of the student's product
    teacher_dtype: torch.dtype = torch.float32

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        rows, columns = self.x.shape
        return (), {"M": rows, "N": columns, "V": self.vocabulary}
