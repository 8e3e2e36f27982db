"""Which backend runs a call: the first in an ordered list that supports it, or an error with every reason."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

import torch

from .hardware import arch

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

BACKENDS = ("cuda", "triton", "eager")

# Measured preferences: (op, arch) -> order of backends. Absent: BACKENDS. Ops with a finer choice (by shape) decide
# it in their own launch tables.
ORDER: dict[tuple[str, int], tuple[str, ...]] = {}


class UnsupportedError(RuntimeError):
    """No backend, or not the one that was named, can run this call."""


@dataclass(frozen=True)
class Choice:
    """Which backend would run a call, with what (where it has a choice of its own), and why others would not."""

    op: str
    backend: str | None
    reasons: dict[str, str]
    detail: str = ""

    def __str__(self):
        lines = [
            f"{self.op}: {self.backend or 'no backend'} runs this call" + (f" ({self.detail})" * bool(self.detail))
        ]
        return "\n".join(lines + [f"  {backend}: {reason}" for backend, reason in self.reasons.items()])


@dataclass(eq=False)
class Call(Generic[R]):
    """A call whose arguments have been checked: what decides where it runs, and what then runs it."""

    op: str
    backends: dict[str, ModuleType]
    backend: str  # as the caller named it
    device: torch.device
    arguments: tuple  # what every backend's unsupported() takes
    run: Callable[[ModuleType], R]


class Op(Protocol[P, R_co]):
    """A public op: what runs the call, and what only prepares it."""

    __signature__: inspect.Signature
    prepare: Callable[P, Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


def op(prepare: Callable[P, Call[R]]) -> Op[P, R]:
    """Makes a public op of a function that checks its arguments and says how to run the call."""

    @functools.wraps(prepare)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch._C._are_functorch_transforms_active() and not torch.compiler.is_compiling():
            raise UnsupportedError(
                f"{prepare.__name__}: the transforms of torch.func (grad, vmap, jvp) are not supported, only autograd"
            )
        call = prepare(*args, **kwargs)
        return call.run(select(call))

    signature = inspect.signature(prepare)
    (result,) = signature.return_annotation.__args__
    public = cast(Op[P, R], run)
    public.__signature__ = signature.replace(return_annotation=result)
    public.prepare = prepare
    return public


def candidates(op: str, device: torch.device, backend: str) -> tuple[str, ...]:
    if backend != "auto":
        return (backend,)
    # The kernels may also run on CPU tensors (in the simulator), which nobody wants unless they ask for it.
    return ("eager",) if device.type == "cpu" else ORDER.get((op, arch(device)), BACKENDS)


def choose(call: Call[Any]) -> tuple[str | None, dict[str, str]]:
    """-> the backend that runs the call, or None, and why those before it do not"""
    if call.backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(('auto', *BACKENDS))}, not {call.backend!r}")
    reasons = {}
    for name in candidates(call.op, call.device, call.backend):
        if name not in call.backends:
            reasons[name] = f"{call.op} has no such kernels"
            continue
        reason = call.backends[name].unsupported(*call.arguments)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    return None, reasons


def select(call: Call[Any]) -> ModuleType:
    name, reasons = choose(call)
    if name is None:
        raise UnsupportedError(
            f"{call.op}: no backend supports this call\n"
            + "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        )
    return call.backends[name]


def explain(op: Callable, *args, **kwargs) -> Choice:
    """Which backend `op(*args, **kwargs)` would run, and why the others would not. Runs the op's checks, not the op."""
    prepare = getattr(op, "prepare", None)
    if prepare is None:
        raise TypeError(f"explain takes an op of gptkernels, not {op!r}")
    call = prepare(*args, **kwargs)
    name, reasons = choose(call)
    describe = getattr(call.backends[name], "describe", None) if name else None
    return Choice(call.op, name, reasons, describe(*call.arguments) if describe else "")
