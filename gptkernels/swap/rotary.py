"""Rotary positions of transformers' attentions, which call a function of their file for them, by its name. Which
rotation that is is tried; an attention then runs its own forward with ours under that name."""

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..dispatch import BACKENDS
from ..ops.checks import DTYPES
from ..ops.rope import rope
from .modules import FAMILIES, SETTINGS, Family, Foreign
from .parts import head_size
from .probe import TOLERANCE

ROTARY, FUNCTION = "rotary positions", "apply_rotary_pos_emb"
# Of a head that models rotate
SHARES = (1.0, 0.75, 0.5, 0.4, 0.25, 0.125)


class Rotation(NamedTuple):
    """What a function is to gptkernels.rope, by the first `columns` of its tables."""

    columns: int
    rotary_dim: int
    interleaved: bool

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: str) -> tuple[Tensor, Tensor]:
        tables = cos[..., : self.columns], sin[..., : self.columns]
        return rope(q, k, *tables, rotary_dim=self.rotary_dim, interleaved=self.interleaved, backend=backend)


def function_of(module: nn.Module) -> Callable | None:
    """What the module's forward calls to rotate its heads"""
    forward = getattr(type(module), "gptkernels_original", type(module)).forward
    if not isinstance(forward, FunctionType) or FUNCTION not in forward.__code__.co_names:
        return None
    return forward.__globals__.get(FUNCTION)


def matches(module: Foreign) -> bool:
    function, size = function_of(module), head_size(module)
    if function is None or size is None or not rotations(function, size):
        return False
    # Not in a call, which torch.compile may be looking at.
    for backend in ("auto", *BACKENDS):
        prepare(type(module).forward, size, backend)
    return True


@functools.cache
def rotations(function: Callable, size: int) -> dict[tuple[int, int], Rotation]:
    """Of heads of that size, or the part of them that is rotated: (dimensions, width of the tables) -> what it does"""
    parts = sorted({int(size * share) // 2 * 2 for share in SHARES} - {0})
    pairs = [(size, width) for width in parts] + [(part, part) for part in parts]
    found = {pair: rotation(function, *pair) for pair in dict.fromkeys(pairs)}
    return {pair: known for pair, known in found.items() if known is not None}


def rotation(function: Callable, size: int, width: int) -> Rotation | None:
    generator = torch.Generator("cpu").manual_seed(0)
    q, k = (torch.randn((2, heads, 3, size), generator=generator, device="cpu") for heads in (4, 2))
    # Both halves of the models' tables are the same where there are two.
    half, whole = (
        torch.randn((2, 2, 3, columns), generator=generator, device="cpu") for columns in (width // 2, width)
    )
    for tables, columns, rotary_dim in (
        (whole, width, width),
        (torch.cat((half, half), -1), width // 2, width),
        (whole, width, 2 * width),
    ):
        for interleaved in (False, True):
            known = Rotation(columns, rotary_dim, interleaved)
            if rotary_dim % 2 == 0 and rotary_dim <= size and agrees(function, known, q, k, *tables):
                return known
    return None


def agrees(function: Callable, known: Rotation, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    try:
        expected = function(q.clone(), k.clone(), cos, sin)
    except Exception:
        return False
    if not isinstance(expected, tuple) or [x.shape for x in expected] != [q.shape, k.shape]:
        return False
    found = known(q, k, cos, sin, "eager")
    return all(bool((a - b).abs().max() <= TOLERANCE[torch.float32]) for a, b in zip(found, expected, strict=True))


# By forward, size of heads and backend: the same code, in whose view of its file the function is ours
FORWARDS: dict[tuple[Callable, int | None, str], Callable] = {}


def prepare(forward: FunctionType, size: Any, backend: str) -> None:
    """size: of the heads, which an attention that matches tells"""
    if (forward, size, backend) in FORWARDS:
        return
    function = forward.__globals__[FUNCTION]
    seen = {**forward.__globals__, FUNCTION: ours(function, rotations(function, size), backend)}
    # torch.compile would look names up in the file itself.
    del seen["__name__"]
    copied = FunctionType(forward.__code__, seen, forward.__name__, forward.__defaults__, forward.__closure__)
    copied.__kwdefaults__ = forward.__kwdefaults__
    FORWARDS[forward, size, backend] = copied


def ours(function: Callable, known: dict[tuple[int, int], Rotation], backend: str) -> Callable:
    def rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others, **named) -> tuple[Tensor, Tensor]:
        """q, k: (B, H, T, D), cos, sin: (B or 1, T, W)"""
        plain = not others and not named and q.ndim == 4 and cos.ndim == 3 and cos.shape[1] == q.shape[2] == k.shape[2]
        # Of two dtypes the function makes what rope does not.
        plain = plain and q.dtype == k.dtype == cos.dtype and q.dtype in DTYPES and not cos.requires_grad
        rotation = known.get((q.shape[-1], cos.shape[-1])) if plain else None
        if rotation is None:
            return function(q, k, cos, sin, *others, **named)
        if cos.shape[0] == 1:
            cos, sin = cos[0], sin[0]
        return rotation(q, k, cos, sin, backend)

    return rotated


def attention_forward(module: Foreign, *args, **kwargs):
    forward, size = type(module).gptkernels_original.forward, head_size(module)
    backend = vars(module)[SETTINGS].backend
    if (forward, size, backend) not in FORWARDS:  # in another process than where it was replaced
        prepare(forward, size, backend)
    return FORWARDS[forward, size, backend](module, *args, **kwargs)


def add_all() -> None:
    FAMILIES[ROTARY] = Family(ROTARY, "rotary", matches, {"forward": attention_forward})
