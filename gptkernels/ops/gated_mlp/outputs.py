"""What the launchers return, allocated: shared by every backend, and by torch.compile as the fake implementation."""

from torch import Tensor

from ..mlp.outputs import empty
from .record import GatedMlpCall

Forward = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
Gradients = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]


def fwd_outputs(call: GatedMlpCall) -> Forward:
    """-> out: (M, d_out), and as far as `save` asks for them gate, up and what becomes of them: (M, hidden)"""
    kept = {"all": 3, "preact": 2, "input": 0}[call.save]
    gate, up, hidden = (hidden_layer(call) if i < kept else None for i in range(3))
    return empty(call.x, call.down_weight), gate, up, hidden


def hidden_layer(call: GatedMlpCall) -> Tensor:
    """-> (M, hidden)"""
    return empty(call.x, call.gate_weight)


def bwd_outputs(
    call: GatedMlpCall,
    dout: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    hidden: Tensor | None,
    needs: list[bool],
    gate_sum: Tensor | None,
    up_sum: Tensor | None,
    down_sum: Tensor | None,
) -> Gradients:
    """needs: whether the gradients of x, gate_weight, up_weight, gate_bias, up_bias, down_weight and down_bias are
    wanted -> those gradients"""
    shapes = (
        call.x.shape,
        *(weight.shape for weight in (call.gate_weight, call.up_weight)),
        *(weight.shape[:1] for weight in (call.gate_weight, call.up_weight)),
        call.down_weight.shape,
        call.down_weight.shape[:1],
    )
    added = (None, gate_sum, up_sum, None, None, down_sum, None)
    x, gate_weight, up_weight, gate_bias, up_bias, down_weight, down_bias = (
        call.x.new_empty(shape) if needed and total is None else None
        for shape, needed, total in zip(shapes, needs, added, strict=True)
    )
    return x, gate_weight, up_weight, gate_bias, up_bias, down_weight, down_bias
