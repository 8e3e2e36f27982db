"""Classes of calls: those of one class are tuned together; a call of another takes what was found for one near it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

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


def of(op: str, arguments: tuple) -> CallClass:
    """arguments: what the op's backends take"""
    return KINDS[op](op, *arguments)


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def attention(op: str, q: Tensor, k: Tensor, v: Tensor, key_start, cu_seqlens, causal, window, *_) -> CallClass:
    kind = dtype_name(q), f"D{q.shape[-1]}", "dense" if window is None else "banded"
    tokens = k.shape[-2] if k.ndim == 4 else k.shape[0]
    heads = q.shape[0] * q.shape[1] if q.ndim == 4 else q.shape[1]
    return CallClass(op, kind, {"T": tokens, "W": window or tokens, "heads": heads})


def decode(op: str, q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths, window, scale) -> CallClass:
    kind = dtype_name(q), f"D{q.shape[-1]}"
    tokens = k_cache.shape[2]
    return CallClass(op, kind, {"T": tokens, "W": window or tokens, "heads": q.shape[0] * k_cache.shape[1]})


def norm(op: str, x: Tensor, *_) -> CallClass:
    return CallClass(op, (dtype_name(x),), {"M": x.shape[:-1].numel(), "N": x.shape[-1]})


def mlp(op: str, x: Tensor, fc_weight: Tensor, *_) -> CallClass:
    return CallClass(op, (dtype_name(x),), {"M": x.shape[0], "N": x.shape[1], "F": fc_weight.shape[0]})


def loss(op: str, x: Tensor, weight: Tensor, *_) -> CallClass:
    return CallClass(op, (dtype_name(x),), {"M": x.shape[0], "N": x.shape[1], "V": weight.shape[0]})


KINDS: dict[str, Callable[..., CallClass]] = {
    "attention": attention,
    "decode_attention": decode,
    "layer_norm": norm,
    "add_layer_norm": norm,
    "rms_norm": norm,
    "add_rms_norm": norm,
    "mlp": mlp,
    "linear_cross_entropy": loss,
}


def nearest(wanted: CallClass, known: dict[CallClass, dict]) -> dict | None:
    """The entry of the class that is nearest, or None where none is near"""
    best, least = None, FARTHEST
    for found, entry in known.items():
        distance = found.distance(wanted)
        if distance <= least:
            best, least = entry, distance
    return best
