"""Gated MLPs of any class, recognised by what they compute: tried in float64 on small layers in place of their own."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops.checks import DTYPES
from ..ops.gated_mlp import gated_mlp, reference
from .modules import FAMILIES, Family, Foreign, original, settings_of
from .parts import is_plain, not_plain

WIDTH, HIDDEN, ROWS = 6, 10, 7  # of what is tried
TOLERANCE = 1e-6  # activations that are alike differ by 1e-4


@dataclass(frozen=True)
class Layout:
    """How a module's linear layers are called, and where a packed one has its gate and up."""

    layers: tuple[str, ...]
    packed: str = ""

    @property
    def about(self) -> str:
        return f"{', '.join(self.layers)}" + (f" in {self.packed}" if self.packed else "")

    def parts(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """(2 hidden, ...) of the packed layer -> gate's and up's, views whose gradients are put together at once"""
        gate, up = tensor.chunk(2) if self.packed == "halves" else tensor.unflatten(0, (-1, 2)).unbind(1)
        return gate, up

    def linears(self, module: Foreign) -> tuple[Foreign, ...] | None:
        found = tuple(module._modules.get(name) for name in self.layers)
        return None if None in found else found

    def tensors(self, module: Foreign) -> dict[str, Tensor | None]:
        """-> gated_mlp's weights and biases"""
        first, *others = self.linears(module) or ()
        *up, down = others
        if self.packed:
            gate_weight, up_weight = self.parts(first.weight)
            gate_bias, up_bias = (None, None) if first.bias is None else self.parts(first.bias)
        else:
            gate_weight, up_weight, gate_bias, up_bias = first.weight, up[0].weight, first.bias, up[0].bias
        weights = {"gate_weight": gate_weight, "up_weight": up_weight, "down_weight": down.weight}
        return {**weights, "gate_bias": gate_bias, "up_bias": up_bias, "down_bias": down.bias}


LAYOUTS = (
    Layout(("gate_proj", "up_proj", "down_proj")),
    Layout(("w1", "w3", "w2")),
    Layout(("gate_up_proj", "down_proj"), "halves"),
    Layout(("gate_up_proj", "down_proj"), "pairs"),
)


def computes(layout: Layout, activation: str) -> Callable[[nn.Module], bool | str]:
    def matches(module: Foreign) -> bool | str:
        linears = layout.linears(module)
        if linears is None or not all(isinstance(getattr(each, "weight", None), Tensor) for each in linears):
            return False
        if not all(is_formula(each, layout, activation) for each in small(module, layout)):
            return False
        return other_reason(module, linears) or True

    return matches


def other_reason(module: Foreign, linears: tuple[nn.Module, ...]) -> str | None:
    """Why a module with the right formula has to stay"""
    dropouts = [name for name, child in module.named_modules() if isinstance(child, nn.Dropout)]
    if dropouts:
        return f"it also has {dropouts[0]}"
    if any(p.dtype == torch.float64 for p in module.parameters()):
        return "it is float64, and the kernels take float32, float16 and bfloat16"
    return not_plain(*linears)


def small(module: Foreign, layout: Layout) -> list[Foreign]:
    """The module with small layers, in training and in evaluation"""
    up_rows = 2 * HIDDEN if layout.packed else HIDDEN
    sizes = [(WIDTH, up_rows)] * (len(layout.layers) - 1) + [(HIDDEN, WIDTH)]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layers = {
            name: nn.Linear(*size, dtype=torch.float64, device="cpu")
            for name, size in zip(layout.layers, sizes, strict=True)
        }
        for layer in layers.values():
            nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    twins = []
    for training in (True, False):
        twin = copy.copy(module)
        twin.__dict__["_modules"] = {**module._modules, **layers}
        twin.__dict__["training"] = training
        twins.append(twin)
    return twins


def is_formula(twin: Foreign, layout: Layout, activation: str) -> bool:
    generator = torch.Generator("cpu").manual_seed(1)
    # gpt-oss's limits show in the large one.
    x = torch.randn((2, ROWS, WIDTH), generator=generator, dtype=torch.float64, device="cpu")
    with torch.no_grad(), torch.random.fork_rng([]):
        for rows in (x, 4 * x):
            try:
                found = twin.forward(rows)
            except Exception:
                return False
            expected = reference.gated_mlp(rows, **layout.tensors(twin), activation=activation)  # type: ignore[arg-type]
            if not isinstance(found, Tensor) or found.shape != expected.shape:
                return False
            if not ((found - expected).abs() <= TOLERANCE * expected.abs().max()).all():
                return False
    return True


def gated_mlp_forward(layout: Layout, activation: str) -> Callable:
    def forward(module: Foreign, x: Tensor) -> Tensor:
        linears = layout.linears(module) or ()
        if x.dtype not in DTYPES or not all(is_plain(each) for each in linears):
            return original(module, "forward")(x)
        backend = settings_of(module).backend
        tensors = layout.tensors(module)
        return gated_mlp(x, **tensors, activation=activation, backend=backend)  # type: ignore[arg-type]

    return forward


# Family -> what its modules have and compute
FORMULAS = {
    f"gated MLP of {layout.about}, {activation}": (layout, activation)
    for layout in LAYOUTS
    for activation in reference.ACTIVATIONS
}


def add_all() -> None:
    for name, formula in FORMULAS.items():
        FAMILIES[name] = Family(name, "mlp", computes(*formula), {"forward": gated_mlp_forward(*formula)})
