"""Attention of a part of a shard's queries: one call of the usual kernels, forward and backward."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import checked, select
from ..ops.attention import attention
from ..ops.dropout import placed
from .layout import Part, Span


@dataclass(frozen=True, eq=False)
class Options:
    """What all parts of a call of attention share; tensors are of the whole sequence. window: (left, right)"""

    causal: bool
    window: tuple[int | None, int | None]
    scale: float
    softcap: float | None
    dropout: float
    key_start: Tensor | None
    slopes: Tensor | None
    packed: bool
    tokens: int  # of the whole sequence
    deterministic: bool
    backend: str

    @property
    def dim(self) -> int:
        """Of the tokens in q, k and v"""
        return 0 if self.packed else 2

    def place_matters(self) -> bool:
        """Whether a key after the last query changes what the others see"""
        return self.window != (None, None) or self.slopes is not None


@dataclass(frozen=True, eq=False)
class PartCall:
    """The queries of one part of a shard, and where they are in it."""

    part: Part
    first: int  # of the queries, in the shard
    options: Options

    @property
    def count(self) -> int:
        return self.part.queries[1] - self.part.queries[0]

    @property
    def ahead(self) -> int:
        """Keys after the last query. The kernels have the last query at the last key, so as many queries of nothing
        follow it."""
        after = self.part.keys[1] - self.part.queries[1]
        return after if after > 0 and self.options.place_matters() else 0

    def queries(self, x: Tensor) -> Tensor:
        """x: q, out or their gradients of the shard -> those of the part"""
        return x.narrow(self.options.dim, self.first, self.count)

    def padded(self, x: Tensor) -> Tensor:
        """x: of the shard -> of the part, with zeros for the queries of nothing"""
        x = self.queries(x)
        if not self.ahead:
            return x
        return F.pad(x, (0, 0, 0, 0, 0, self.ahead) if self.options.packed else (0, 0, 0, self.ahead))

    def padded_lse(self, lse: Tensor) -> Tensor:
        """lse: (B, H, T) or packed (H, T) -> of the part, infinite for the queries of nothing, where no key weighs"""
        lse = lse.narrow(-1, self.first, self.count)
        return F.pad(lse, (0, self.ahead), value=torch.inf) if self.ahead else lse.contiguous()

    def prepared(self, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, seed: Tensor | None) -> tuple[Any, Any]:
        """q: of the shard, k, v: of the part's keys, seed: of the whole -> kernels, record"""
        options = self.options
        more: dict[str, Any] = {"deterministic": options.deterministic or torch.are_deterministic_algorithms_enabled()}
        start, stop = self.part.keys
        slopes = options.slopes
        if options.packed:
            ends = (*self.part.bounds[:-1], self.part.bounds[-1] + self.ahead)
            more["cu_seqlens"] = on_device(ends, q.device)
            more["cu_seqlens_k"] = on_device(self.part.key_bounds, q.device)
            if slopes is not None and slopes.ndim == 2:
                slopes = slopes[slice(*self.part.documents)]
        elif options.key_start is not None:
            more["key_start"] = (options.key_start - start).clamp(0, stop - start)
        call = attention.prepare(
            self.padded(q), k, v, causal=options.causal, window=options.window, scale=options.scale,
            dropout=options.dropout, softcap=options.softcap, sinks=sinks, alibi_slopes=slopes, return_lse=True,
            backend=options.backend, **more,
        )  # fmt: skip
        record: Any = checked(call)
        if seed is not None:
            record.seed = placed(seed, options.tokens, self.part.queries[0], start)
        return select(call, record), record


def on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def calls_of(parts: tuple[Part, ...], spans: tuple[Span, ...], options: Options) -> list[PartCall]:
    """spans: of the shard"""
    found, before = [], 0
    for span in spans:
        inside = [part for part in parts if span[0] <= part.queries[0] < span[1]]
        found += [PartCall(part, before + part.queries[0] - span[0], options) for part in inside]
        before += span[1] - span[0]
    return found


def forward(
    call: PartCall, q: Tensor, keys: tuple[Tensor, Tensor], sinks: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q: of the shard, keys: of the part -> out and lse of the part's queries"""
    kernels, record = call.prepared(q, *keys, sinks, seed)
    out, lse = kernels.attention_fwd(record)
    return out.narrow(call.options.dim, 0, call.count), lse.narrow(-1, 0, call.count)


def backward(
    call: PartCall,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    keys: tuple[Tensor, Tensor],
    sinks: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """out, lse: of the shard, over all of its keys -> dq of the part's queries, dk, dv of its keys, dsinks"""
    kernels, record = call.prepared(q, *keys, sinks, seed)
    if dlse is not None:
        dlse = F.pad(dlse.narrow(-1, call.first, call.count), (0, call.ahead)).contiguous()
    rows = call.padded(dout), call.padded(out), call.padded_lse(lse)
    dq, dk, dv, dsinks = kernels.attention_bwd(record, *rows, dlse)
    return dq.narrow(call.options.dim, 0, call.count), dk, dv, None if sinks is None else dsinks
