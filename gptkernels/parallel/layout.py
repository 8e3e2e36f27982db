"""Which tokens of a sequence each rank holds, and which of the others' keys its queries see. Plain numbers, no tensors.

    contiguous   rank r of P has the r-th of P pieces
    zigzag       the r-th and the r-th from the end of 2 P: of a causal mask every rank has as much as another

A span is (start, stop), of positions in the whole sequence; a rank's shard is its spans, one behind the other.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..ops.attention.visibility import Side

LAYOUTS = ("contiguous", "zigzag")
Span = tuple[int, int]


@dataclass(frozen=True)
class Layout:
    size: int  # ranks
    kind: str = "contiguous"

    @property
    def pieces(self) -> int:
        """A sequence's length is a multiple of it"""
        return self.size * (2 if self.kind == "zigzag" else 1)

    def numbers(self, rank: int) -> tuple[int, ...]:
        """Of the rank's pieces"""
        return (rank,) if self.kind == "contiguous" else (rank, 2 * self.size - 1 - rank)

    def spans(self, rank: int, tokens: int) -> tuple[Span, ...]:
        """tokens: of a shard. Pieces that touch are one span."""
        piece = tokens * self.size // self.pieces
        return joined((n * piece, (n + 1) * piece) for n in self.numbers(rank))


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """The same positions as spans that neither overlap nor touch, in order"""
    found: list[Span] = []
    for start, stop in sorted(span for span in spans if span[0] < span[1]):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return tuple(found)


def common(ones: Iterable[Span], others: Iterable[Span]) -> tuple[Span, ...]:
    """What both have"""
    others = tuple(others)
    return joined((max(a, c), min(b, d)) for a, b in ones for c, d in others)


def without(ones: Iterable[Span], others: Iterable[Span]) -> tuple[Span, ...]:
    """What only the first have"""
    for c, d in others:
        ones = [piece for a, b in ones for piece in ((a, min(b, c)), (max(a, d), b))]
    return joined(ones)


class Part(NamedTuple):
    """Queries of a shard that one call computes, and the keys that they see."""

    queries: Span
    keys: Span
    # With documents: which of them, and their bounds among the queries and the keys
    documents: Span
    bounds: tuple[int, ...]
    key_bounds: tuple[int, ...]


def parts_of(span: Span, bounds: tuple[int, ...], left: Side, right: Side) -> list[Part]:
    """The queries of a span, those that see a key outside of it apart from the others. bounds: of documents, from 0 to
    the whole length"""
    a, b = span
    first, last = document_at(bounds, a), document_at(bounds, b - 1)
    lowest, highest = bounds[first], bounds[last + 1]
    low = high = None
    if lowest < a and left != 0:
        low = min(bounds[first + 1], b, b if left is None else a + left)
    if highest > b and right != 0:
        high = max(bounds[last], a, a if right is None else b - right)
    if low is None and high is None:
        cuts = [a, b]
    else:
        cuts = [a, *(cut for cut in (low, high) if cut is not None and a < cut < b), b]
        if sorted(set(cuts)) != cuts:  # queries in the middle see keys on both sides
            cuts = [a, b]
    return [part_of((start, stop), bounds, left, right) for start, stop in zip(cuts, cuts[1:], strict=False)]


def document_at(bounds: tuple[int, ...], position: int) -> int:
    """The one with this position"""
    low, high = 0, len(bounds) - 2
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if bounds[middle] <= position else (low, middle - 1)
    return low


def part_of(queries: Span, bounds: tuple[int, ...], left: Side, right: Side) -> Part:
    a, b = queries
    first, last = document_at(bounds, a), document_at(bounds, b - 1)
    start, stop = bounds[first], bounds[last + 1]
    keys = start if left is None else max(start, a - left), stop if right is None else min(stop, b + right)
    inner = bounds[first + 1 : last + 1]
    return Part(
        queries,
        keys,
        (first, last + 1),
        (0, *(x - a for x in inner), b - a),
        (0, *(x - keys[0] for x in inner), keys[1] - keys[0]),
    )


class Plan(NamedTuple):
    """What one rank computes, and the keys that it gets and gives."""

    spans: tuple[Span, ...]
    parts: tuple[Part, ...]
    receives: tuple[tuple[int, tuple[Span, ...]], ...]  # rank -> spans of its shard
    sends: tuple[tuple[int, tuple[Span, ...]], ...]


@lru_cache(maxsize=64)
def plan_of(layout: Layout, rank: int, tokens: int, bounds: tuple[int, ...], left: Side, right: Side) -> Plan:
    """tokens: of a shard"""
    spans = [layout.spans(r, tokens) for r in range(layout.size)]
    parts = [tuple(part for span in of for part in parts_of(span, bounds, left, right)) for of in spans]
    needed = [without((part.keys for part in parts[r]), spans[r]) for r in range(layout.size)]
    receives = ((r, common(needed[rank], spans[r])) for r in range(layout.size) if r != rank)
    sends = ((r, common(needed[r], spans[rank])) for r in range(layout.size) if r != rank)
    kept = (tuple((r, found) for r, found in pairs if found) for pairs in (receives, sends))
    return Plan(spans[rank], parts[rank], *kept)
