"""Classes of calls: those of one class are tuned together; a call of another takes what was found for one near it."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from ..records import Record

# A call further from everything measured than this many doublings, over all of its sizes, is not known.
FARTHEST = 4.0


@dataclass(frozen=True)
class CallClass:
    """kind: what must be the same. sizes: what may differ."""

    op: str
    kind: tuple[str, ...]
    sizes: dict[str, int] = field(hash=False)

    def distance(self, other: "CallClass") -> float:
        """In doublings of sizes; infinite between kinds"""
        if (self.op, self.kind, self.sizes.keys()) != (other.op, other.kind, other.sizes.keys()):
            return math.inf
        return sum(abs(math.log2(max(size, 1) / max(other.sizes[name], 1))) for name, size in self.sizes.items())

    def __str__(self):
        return " ".join((self.op, *self.kind, *(f"{name}{size}" for name, size in self.sizes.items())))


def of(op: str, call: Record) -> CallClass:
    kind, sizes = call.traits()
    return CallClass(op, (dtype_name(call.first), *kind), sizes)


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def nearest(wanted: CallClass, known: dict[CallClass, dict]) -> dict | None:
    """The entry of the class that is nearest, or None where none is near"""
    best, least = None, FARTHEST
    for found, entry in known.items():
        distance = found.distance(wanted)
        if distance <= least:
            best, least = entry, distance
    return best
