"""Which backend runs a call: the first in an ordered list that supports it, or an error with every reason."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

import torch

from .failures import UnsupportedError
from .records import Record, with_key
from .remembered import Memory, likeness
from .tuning import choices

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

BACKENDS = ("cuda", "triton", "eager")


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


@dataclass(eq=False, slots=True)
class Call(Generic[R]):
    """A call of an op, in the steps that it is made in."""

    op: str
    backends: dict[str, ModuleType]
    backend: str  # as the caller named it
    # Raises for what no backend takes. Not repeated for a call like one that has passed, so it reads no values.
    check: Callable[[], None]
    # What travels to the kernels: every backend's unsupported() takes it, and `run` after the backend.
    record: Callable[[], Record]
    run: Callable[[ModuleType, Any], R]


class Op(Protocol[P, R_co]):
    """A public op: what runs the call, and what only prepares it."""

    __signature__: inspect.Signature
    prepare: Callable[P, Any]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


# By the name of an op, what runs in its place for now: inside of a context that gives its arguments another meaning.
instead: dict[str, Callable[..., Any]] = {}


def op(native: Callable[..., Any] | None = None) -> Callable[[Callable[P, Call[R]]], Op[P, R]]:
    """Makes a public op of a function that says in which steps to run a call.

    native: PyTorch's own op for the calls where nothing is gained over it, without the steps, which would take as long
    as a small op. It gets what the caller passed; other calls it answers by NotImplemented, or by PyTorch's own error.
    """

    def make(prepare: Callable[P, Call[R]]) -> Op[P, R]:
        return public_op(prepare, native)

    return make


def public_op(prepare: Callable[P, Call[R]], native: Callable[..., R] | None) -> Op[P, R]:
    decided = Memory()

    @functools.wraps(prepare)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if instead and prepare.__name__ in instead:
            return instead[prepare.__name__](*args, **kwargs)
        if torch.compiler.is_compiling():  # once, and torch asks from then on whether a call is like this one
            call = prepare(*args, **kwargs)
            record = checked(call)
            return call.run(select(call, record), record)
        if torch._C._are_functorch_transforms_active():
            raise UnsupportedError(
                f"{prepare.__name__}: the transforms of torch.func (grad, vmap, jvp) are not supported, only autograd"
            )
        recorded = _recorded.get()
        if native is not None and recorded is None:
            try:
                result = native(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            except (RuntimeError, TypeError):
                pass  # our own checks say what is wrong
        call = prepare(*args, **kwargs)
        key = likeness((call.op, *args, *kwargs, *kwargs.values()))
        kernels = decided.get(key)
        if key is None and has_dtensors((*args, *kwargs.values())):
            # It knows all ops, and so none of them can know it but by its name.
            return import_module(".parallel.sharding", __package__).run_sharded(public, args, kwargs)
        record = with_key(checked(call) if kernels is None else call.record(), key)
        if kernels is None:
            decided.keep(key, kernels := select(call, record))
        if recorded is not None:
            recorded.append((call.op, record))
        return call.run(kernels, record)

    signature = inspect.signature(prepare)
    (result,) = signature.return_annotation.__args__
    public = cast(Op[P, R], run)
    public.__signature__ = signature.replace(return_annotation=result)
    public.prepare = prepare
    return public


def has_dtensors(values: Iterable) -> bool:
    """Without importing what only they need"""
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and any(isinstance(value, known.DTensor) for value in values)


def checked(call: Call[Any]) -> Record:
    call.check()
    return call.record()


# (op, record) of each call in this context, where someone wants them
_recorded: ContextVar[list[tuple[str, Record]] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording() -> Iterator[list[tuple[str, Record]]]:
    """Notes every call of an op inside, in this thread: (op, what its backend got)."""
    calls: list[tuple[str, Record]] = []
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


def candidates(op: str, record: Record, backend: str) -> tuple[str, ...]:
    """In the order in which they are asked"""
    if backend != "auto":
        return (backend,)
    # The kernels may also run on CPU tensors (in the simulator), which nobody wants unless they ask for it.
    usual = ("eager",) if record.first.device.type == "cpu" else BACKENDS
    return tuple(dict.fromkeys((*choices.order(op, record), *usual)))


def choose(call: Call[Any], record: Record) -> tuple[str | None, dict[str, str]]:
    """-> the backend that runs the call, or None, and why those before it do not"""
    if call.backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(('auto', *BACKENDS))}, not {call.backend!r}")
    reasons = {}
    for name in candidates(call.op, record, call.backend):
        if name not in call.backends:
            reasons[name] = f"{call.op} has no such kernels"
            continue
        reason = call.backends[name].unsupported(record)
        if reason is None:
            return name, reasons
        reasons[name] = reason
    return None, reasons


def select(call: Call[Any], record: Record) -> ModuleType:
    name, reasons = choose(call, record)
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
    record = checked(call)
    name, reasons = choose(call, record)
    describe = getattr(call.backends[name], "describe", None) if name else None
    details = [describe(record)] if describe else []
    if call.backend == "auto":
        details.append(choices.told(call.op, record))
    return Choice(call.op, name, reasons, "; ".join(filter(None, details)))
