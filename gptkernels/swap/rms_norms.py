"""RMSNorms of any class, recognised by what they compute: tried in bfloat16, where the orders of rounding show."""

import copy
from collections.abc import Callable
from typing import cast as cast_to

import torch
from torch import Tensor, nn

from ..ops.checks import DTYPES
from ..ops.rms_norm import eager, rms_norm
from ..ops.rms_norm.native import CASTS
from .modules import FAMILIES, Family, Foreign, original, settings_of

# Family -> how its modules are said here
ORDERS = {
    "RMSNorm as Llama's": ("llama", 0.0),
    "RMSNorm as Gemma's": ("gemma", 1.0),
    "RMSNorm as gpt-oss's": ("gpt_oss", 0.0),
}
ROWS = 16


def eps_of(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) and found > 0 else None


def looks_like_rms_norm(module: Foreign) -> bool:
    """A norm with a weight for each column and nothing else"""
    parameters = dict(module.named_parameters())
    return (
        "Norm" in type(module).__name__
        and parameters.keys() == {"weight"}
        and parameters["weight"].ndim == 1
        and not list(module.children())
        and eps_of(module) is not None
    )


def computes(cast: str, offset: float) -> Callable[[nn.Module], bool]:
    """Whether a module has the bits of this order, with random weights in place of its own."""

    def matches(module: Foreign) -> bool:
        eps, generator = eps_of(module), torch.Generator("cpu").manual_seed(0)
        if not looks_like_rms_norm(module) or eps is None:
            return False
        width = module.weight.shape[0]
        x, weight = torch.randn((ROWS + 1, width), generator=generator, device="cpu").bfloat16().split((ROWS, 1))
        twin = copy.deepcopy(module)
        twin.weight = nn.Parameter(weight[0], requires_grad=False)
        with torch.no_grad():
            for rows in (x, x * 1e-3):  # an epsilon shows in the small ones
                try:
                    found = twin.forward(rows)
                except Exception:
                    return False
                expected = eager.normalised(rows, twin.weight, eps, offset, CASTS[cast], rows.dtype)[0]
                if not isinstance(found, Tensor) or found.dtype != rows.dtype or not torch.equal(found, expected):
                    return False
        return True

    return matches


def rms_norm_forward(cast: str, offset: float) -> Callable:
    def forward(module: Foreign, x: Tensor) -> Tensor:
        # Of two dtypes the original makes what rms_norm does not: of Llama's kind the wider one.
        wide = cast != "llama" and module.weight.dtype == torch.float32
        if x.dtype not in DTYPES or (module.weight.dtype != x.dtype and not wide):
            return original(module, "forward")(x)
        eps, backend = cast_to(float, eps_of(module)), settings_of(module).backend
        return rms_norm(x, module.weight, eps=eps, offset=offset, cast=cast, backend=backend)

    return forward


def add_all() -> None:
    for name, order in ORDERS.items():
        FAMILIES[name] = Family(name, "norm", computes(*order), {"forward": rms_norm_forward(*order)})
