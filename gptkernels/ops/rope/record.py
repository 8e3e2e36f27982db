"""What a call of the rotation travels as, from the op to the kernels."""

from dataclasses import dataclass

from torch import Tensor

from ...records import Record


@dataclass(slots=True, eq=False)
class NormRopeCall(Record):
    """As rope takes it with norms of the heads: what RopeCall has, and what these take."""

    q: Tensor  # (B, H, T, D)
    k: Tensor  # (B, Hkv, T, D)
    cos: Tensor  # (T, W) or (B, T, W), W the rotated dimensions or half as many
    sin: Tensor  # as cos
    q_norm: Tensor  # (D,)
    k_norm: Tensor  # (D,)
    rotated: int
    interleaved: bool
    eps: float
    offset: float
    cast_first: bool  # see RMSNormCall

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        kind, sizes = self.rope().traits()
        return (*kind, "normed"), sizes

    def rope(self, transposed: bool = False) -> "RopeCall":
        return RopeCall(self.q, self.k, self.cos, self.sin, self.rotated, self.interleaved, transposed)


@dataclass(slots=True, eq=False)
class RopeCall(Record):
    """As rope takes it, with a last dimension that is contiguous."""

    q: Tensor  # (B, H, T, D)
    k: Tensor  # (B, Hkv, T, D)
    cos: Tensor  # (T, W) or (B, T, W), W the rotated dimensions or half as many
    sin: Tensor  # as cos
    rotated: int  # how many dimensions are rotated; the rest passes through
    interleaved: bool
    transposed: bool = False  # as the gradient is rotated: back

    def traits(self) -> tuple[tuple[str, ...], dict[str, int]]:
        batch, heads, tokens, size = self.q.shape
        return (f"D{size}",), {"M": batch * tokens, "heads": heads + self.k.shape[1]}
