"""What calls of attention travel as, from the ops to the kernels."""

from dataclasses import dataclass

from torch import Tensor

from ...records import Record


@dataclass(slots=True, eq=False)
class AttentionCall(Record):
    """As attention takes it, with heads of at least 16 whose last dimension is contiguous, and all options decided."""

    q: Tensor  # (B, H, Tq, D), or packed (T, H, D)
    k: Tensor  # (B, Hkv, Tk, D), or packed (T, Hkv, D)
    v: Tensor  # as k
    key_start: Tensor | None = None  # (B,) int32
    cu_seqlens: Tensor | None = None  # (N + 1,) int32
    seed: Tensor | None = None  # (1,) int64, drawn in the forward pass where there is dropout
    causal: bool = True
    window: int | None = None  # below the number of keys
    scale: float = 1.0
    dropout: float = 0.0

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        kind = f"D{self.q.shape[-1]}", "dense" if self.window is None else "banded"
        packed = self.q.ndim == 3
        tokens = self.k.shape[0 if packed else 2]
        heads = self.q.shape[1] if packed else self.q.shape[0] * self.q.shape[1]
        return kind, {"T": tokens, "W": self.window or tokens, "heads": heads}


@dataclass(slots=True, eq=False)
class DecodeCall(Record):
    """As decode_attention takes it, in the same sense."""

    q: Tensor  # (B, H, Tq, D)
    k_cache: Tensor  # (B, Hkv, capacity, D)
    v_cache: Tensor  # as k_cache
    lengths: Tensor  # (B,) int32
    window: int | None = None  # at most the capacity
    scale: float = 1.0

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        tokens = self.k_cache.shape[2]
        heads = self.q.shape[0] * self.k_cache.shape[1]
        return (f"D{self.q.shape[-1]}",), {"T": tokens, "W": self.window or tokens, "heads": heads}


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, head and token in (B, H, T, D) or packed (T, H, D)"""
    if x.ndim == 4:
        return x.stride(0), x.stride(1), x.stride(2)
    return 0, x.stride(1), x.stride(0)
