"""What is in force: the order of backends and the launch settings that were measured for calls like the one at hand.

Only asked about a call that is like none before (see remembered.py), so it costs the others nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .. import hardware
from ..records import Record
from ..remembered import forget
from . import classes, store

_known: dict[tuple[str, int | None], dict[classes.CallClass, dict]] = {}
_trial: dict[str, Any] | None = None


def entry(op: str, record: Record) -> dict | None:
    """What was measured for calls like this one on its device"""
    if torch.compiler.is_compiling():
        return None
    device = record.first.device
    if device.type not in ("cpu", "cuda") or hardware.is_simulated(device):
        return None
    found = known(device)
    return classes.nearest(classes.of(op, record), found) if found else None


def known(device: torch.device) -> dict[classes.CallClass, dict]:
    """All that was measured on the device, or on one like it where nothing was; read once"""
    key = device.type, device.index
    if key not in _known:
        _known[key] = store.load(device) or store.shipped(device)
    return _known[key]


def order(op: str, record: Record) -> list[str]:
    """Backends, the fastest first; none where nothing was measured"""
    found = entry(op, record) if _trial is None else None
    return [name for name, _ in found["order"]] if found else []


def setting(name: str, op: str, record: Record, default: Any) -> Any:
    """A launch setting, such as "attention_fwd": (BLOCK_M, BLOCK_N, warps, stages)"""
    if _trial is not None:
        return as_default(_trial.get(name), default)
    found = entry(op, record)
    return as_default(found["settings"].get(name) if found else None, default)


def told(op: str, record: Record) -> str:
    """Why `auto` takes what it takes"""
    found = entry(op, record)
    if found:
        times = ", ".join(f"{name} {us:.0f} us" for name, us in found["order"])
        where = "on a GPU like this one, not here," if found.get("shipped") else "here"
        return f"measured {where} on {found['when'][:10]}: {times}"
    on_gpu = record.first.device.type == "cuda"
    return "not measured on this GPU, which `gptkernels tune` does" if on_gpu else ""


def summary(device: torch.device) -> dict:
    """How much is known of the device, and since when"""
    days = sorted(found["when"][:10] for found in known(device).values() if not found.get("shipped"))
    return {"classes": len(days), "first": min(days, default=None), "last": max(days, default=None)}


def age(device: torch.device) -> str:
    found = summary(device)
    if not found["classes"]:
        return "never (gptkernels tune)"
    return f"{found['classes']} classes of calls, {' to '.join(dict.fromkeys((found['first'], found['last'])))}"


def in_force(op: str, record: Record) -> str | None:
    """The launch settings that were measured for calls like this one; None: nothing was"""
    found = entry(op, record)
    if not found:
        return None
    settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    return settings or "as shipped"


def as_default(value: Any, default: Any) -> Any:
    """value: from JSON, which has no tuples"""
    if value is None:
        return default
    return tuple(value) if isinstance(default, Sequence) and not isinstance(default, str) else value


@contextmanager
def trying(settings: dict[str, Any]) -> Iterator[None]:
    """Inside, these are in force and nothing that was measured is."""
    global _trial
    before, _trial = _trial, settings
    forget()
    try:
        yield
    finally:
        _trial = before
        forget()


def reload() -> None:
    """After a file has changed"""
    _known.clear()
    forget()
