"""What the launchers return, allocated: shared by every backend, and by torch.compile as the fake implementation."""

from torch import Tensor

from ..attention.outputs import empty_in_order_of
from .record import RopeCall


def fwd_outputs(call: RopeCall) -> tuple[Tensor, Tensor]:
    return empty_in_order_of(call.q), empty_in_order_of(call.k)
