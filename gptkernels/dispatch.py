"""Which backend runs a call: the first in an ordered list that supports it, or an error with every reason."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from .hardware import arch

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


def candidates(op: str, device, backend: str) -> tuple[str, ...]:
    if backend != "auto":
        return (backend,)
    # The kernels may also run on CPU tensors (in the simulator), which nobody wants unless they ask for it.
    return ("eager",) if device.type == "cpu" else ORDER.get((op, arch(device)), BACKENDS)


def choose(op: str, backends: dict[str, ModuleType], backend: str, device, args: tuple) -> Choice:
    """args: what every backend's unsupported() takes."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(('auto', *BACKENDS))}, not {backend!r}")
    reasons = {}
    for name in candidates(op, device, backend):
        reason = backends[name].unsupported(*args) if name in backends else f"{op} has no such kernels"
        if reason is None:
            describe = getattr(backends[name], "describe", None)
            return Choice(op, name, reasons, describe(*args) if describe and _listener else "")
        reasons[name] = reason
    return Choice(op, None, reasons)


# Set by explain(): called with each Choice instead of running the op.
_listener: Callable[[Choice], None] | None = None


class _Explained(BaseException):
    """Leaves an op after its choice was made; BaseException so that no `except Exception` on the way eats it."""


def select(op: str, backends: dict[str, ModuleType], backend: str, device, args: tuple) -> ModuleType:
    choice = choose(op, backends, backend, device, args)
    if _listener is not None:
        _listener(choice)
        raise _Explained
    if choice.backend is None:
        raise UnsupportedError(
            f"{op}: no backend supports this call\n"
            + "\n".join(f"  {name}: {reason}" for name, reason in choice.reasons.items())
        )
    return backends[choice.backend]


def explain(op: Callable, *args, **kwargs) -> Choice:
    """Which backend `op(*args, **kwargs)` would run, and why the others would not. Runs the op's checks, not the op."""
    global _listener
    heard = []
    _listener = heard.append
    try:
        op(*args, **kwargs)
    except _Explained:
        return heard[0]
    finally:
        _listener = None
    raise TypeError(f"explain takes an op of gptkernels, not {op!r}")
