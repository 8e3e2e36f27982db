"""Whether a module would still compute what it did: for modules that were recognised by their looks only."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .modules import Settings
from .replacing import replace, restore

ROWS, TOKENS = 2, 8
# Of the largest value; float32 sums in another order, and the roundings of the 16-bit types.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def difference(module: nn.Module, families: tuple[str, ...], width: int) -> str | None:
    """Why the module must not take those families' methods, None if it may; it is as before afterwards."""
    weight = next(module.parameters())
    if weight.device.type == "meta":
        return "it is on the meta device, where what it computes cannot be compared"
    x = torch.randn((ROWS, TOKENS, width), generator=torch.Generator().manual_seed(0)).to(weight)
    # An epsilon shows in the small one.
    inputs = x, x * 1e-3
    with torch.no_grad(), undisturbed(module):
        try:
            before = [result(module, x) for x in inputs]
            module.train()
            training = [result(module, x) for x in inputs]
        except Exception as error:
            return f"it could not be called with a tensor alone ({type(error).__name__}: {error})"
        if not all(map(close, training, before)):
            return "it drops something out in training that is not in one of its nn.Dropout modules"
        module.eval()
        replace(module, families, Settings())
        try:
            after = [result(module, x) for x in inputs]
        except (TypeError, ValueError) as error:
            return f"the kernels do not take what it works with ({error})"
        finally:
            restore(module)
    return None if all(map(close, after, before)) else "it computes something else than what it looks like"


def result(module: nn.Module, x: Tensor) -> Tensor:
    """Without the module's hooks, which are not to notice."""
    out = module.forward(x)
    if not isinstance(out, Tensor):
        raise TypeError(f"it returns {type(out).__name__}")
    return out


def close(value: Tensor, expected: Tensor) -> bool:
    allowed = TOLERANCE[expected.dtype] * expected.abs().max().clamp(min=1e-30)
    return value.shape == expected.shape and bool(((value - expected).abs() <= allowed).all())


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """In evaluation and without dropout; random numbers, modes and probabilities are as before afterwards."""
    modes = {each: each.training for each in module.modules()}
    dropouts = {each: each.p for each in modes if isinstance(each, nn.Dropout)}
    # nanoGPT hands its own probability to PyTorch's attention.
    own = vars(module).get("dropout")
    devices = [weight.device for weight in module.parameters() if weight.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices):
        try:
            module.eval()
            for dropout in dropouts:
                dropout.p = 0.0
            if isinstance(own, float):
                vars(module)["dropout"] = 0.0
            yield
        finally:
            for each, training in modes.items():
                each.training = training
            for dropout, p in dropouts.items():
                dropout.p = p
            if isinstance(own, float):
                vars(module)["dropout"] = own
