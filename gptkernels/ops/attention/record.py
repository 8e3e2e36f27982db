"""What calls of attention travel as, from the ops to the kernels."""

from dataclasses import dataclass

from torch import Tensor

from ...records import Record


@dataclass(slots=True, eq=False)
class AttentionCall(Record):
    """As attention takes it, with heads of at least 16 whose last dimension is contiguous, and all options decided."""

    q: Tensor  # (B, H, Tq, D), or packed (T, H, D)
    k: Tensor  # (B, Hkv, Tk, D), or packed (T or Tk, Hkv, D)
    v: Tensor  # as k
    sinks: Tensor | None = None  # (H,), in q's dtype or float32
    key_start: Tensor | None = None  # (B,) int32
    cu_seqlens: Tensor | None = None  # (N + 1,) int32
    cu_seqlens_k: Tensor | None = None  # as cu_seqlens; None: the same
    alibi_slopes: Tensor | None = None  # (H,) or (B or N, H) float32
    seed: Tensor | None = None  # (1,) int64, drawn in the forward pass where there is dropout; (4,): ops/dropout.py
    # How many keys a query sees before and after its own position, fewer than there are; None: all.
    left: int | None = None
    right: int | None = 0
    scale: float = 1.0
    dropout: float = 0.0
    softcap: float | None = None
    return_lse: bool = False
    deterministic: bool = False  # gradients with the same bits on every run, whatever that costs

    @property
    def causal(self) -> bool:
        return self.right == 0

    @property
    def window(self) -> int | None:
        """Of a band its wider side, the query's own key included"""
        return None if self.left is None or self.right is None else max(self.left, self.right) + 1

    def added(self) -> list[str]:
        """What beyond a mask, dropout and a scale it has, by the names of arguments"""
        names = ["sinks", "alibi_slopes", "softcap", "cu_seqlens_k"]
        return [name for name in names if getattr(self, name) is not None] + ["return_lse"] * self.return_lse

    def key_bounds(self) -> Tensor | None:
        """Of packed documents, in rows of k"""
        return self.cu_seqlens if self.cu_seqlens_k is None else self.cu_seqlens_k

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        kind = f"D{self.q.shape[-1]}", "dense" if self.window is None else "banded"
        packed = self.q.ndim == 3
        tokens = self.k.shape[0 if packed else 2]
        heads = self.q.shape[1] if packed else self.q.shape[0] * self.q.shape[1]
        sizes = {"T": tokens, "W": self.window or tokens, "heads": heads}
        return (*kind, *self.added()), sizes


@dataclass(slots=True, eq=False)
class DecodeCall(Record):
    """As decode_attention takes it, in the same sense."""

    q: Tensor  # (B, H, Tq, D)
    k_cache: Tensor  # (B, Hkv, capacity, D), or (pages, Hkv, page, D)
    v_cache: Tensor  # as k_cache
    lengths: Tensor  # (B,) int32
    block_table: Tensor | None = None  # (B, pages of a row) int32
    sinks: Tensor | None = None  # (H,), in q's dtype or float32
    key_start: Tensor | None = None  # (B,) int32
    window: int | None = None  # at most the capacity
    causal: bool = True
    scale: float = 1.0
    softcap: float | None = None

    @property
    def capacity(self) -> int:
        """Of a row"""
        return self.k_cache.shape[2] * (1 if self.block_table is None else self.block_table.shape[1])

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        tokens, paged = self.capacity, ("paged",) * (self.block_table is not None)
        heads = self.q.shape[0] * self.k_cache.shape[1]
        return (f"D{self.q.shape[-1]}", *paged), {"T": tokens, "W": self.window or tokens, "heads": heads}


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, head and token in (B, H, T, D) or packed (T, H, D)"""
    if x.ndim == 4:
        return x.stride(0), x.stride(1), x.stride(2)
    return 0, x.stride(1), x.stride(0)
