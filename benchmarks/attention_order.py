"""What a fixed order of the sums of dq costs the attention backward: a model of who waits for whom, on no GPU.

    python benchmarks/attention_order.py

Time is counted in steps of one block of keys times one block of queries. CTAs take tiles (a block of keys of a head)
from a counter, in ascending order of keys in each section of heads, and walk over their queries; in a fixed order, a
block of keys adds to a block of queries only after the one before it has.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

# Steps: what a tile takes beside its products, and until an addition is seen by the CTA that waits for it.
TILE, SEEN = 1.0, 0.5


@dataclass(frozen=True)
class Case:
    tokens: int
    heads: int  # of all sequences together
    head_dim: int
    window: int | None = None
    causal: bool = True

    @property
    def blocks(self) -> tuple[int, int]:
        """Queries and keys of a step, as csrc/attention/attention_bwd_tile.cuh has them"""
        return (128, 128) if self.head_dim <= 64 else (64, 128)

    def queries(self, n: int) -> range:
        """Blocks of queries that see the n-th block of keys."""
        rows, keys = self.blocks
        reach = self.tokens if self.window is None else self.window
        first = n * keys if self.causal else max(0, n * keys - reach + 1)
        last = min(self.tokens, (n + 1) * keys + reach - 1) - 1
        return range(first // rows, last // rows + 1)

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Block of keys and head, as csrc/attention/attention_tile.cuh orders them: heads of 32 MiB together first."""
        section = max(1, 2**25 // (self.tokens * self.head_dim * 8))
        for first in range(0, self.heads, section):
            for n in range(-(-self.tokens // self.blocks[1])):
                for head in range(first, min(first + section, self.heads)):
                    yield n, head


def steps(case: Case, order: str, sms: int = 132) -> float:
    """Until all is done. order: "any", or a fixed one with each tile's queries "ascending" or "descending" """
    free, added = [0.0] * sms, {}
    for n, head in case.tiles():
        time = heapq.heappop(free) + TILE
        for m in case.queries(n) if order == "ascending" else case.queries(n)[::-1]:
            time += 1
            if order != "any":
                time = max(time, added.get((head, m), -SEEN) + SEEN)
                added[head, m] = time
        heapq.heappush(free, time)
    return max(free)


def cost(case: Case, order: str) -> float:
    """Times the steps in any order"""
    return steps(case, order) / steps(case, "any")


BANDED = [
    Case(32768, 16, 64, 128), Case(32768, 128, 64, 128), Case(8192, 12, 64, 256), Case(32768, 16, 64, 1024),
    Case(8192, 32, 128, 1024),
]  # fmt: skip
DENSE = [
    Case(2048, 32, 64), Case(4096, 32, 128), Case(8192, 32, 128), Case(8192, 32, 64), Case(16384, 16, 128),
    Case(32768, 16, 128), Case(2048, 32, 64, causal=False), Case(8192, 32, 128, causal=False),
]  # fmt: skip
# Two tiles of a section for each multiprocessor, or less: half of the blocks of keys of a head run at the same time.
FEW = [Case(2048, 12, 64), Case(8192, 8, 128)]


def main() -> None:
    print("tokens  heads  D    window  causal  queries ascending  descending (times the steps in any order)")
    for case in [*BANDED, *DENSE, *FEW]:
        shape = f"{case.tokens:6}  {case.heads:5}  {case.head_dim:3}  {case.window or '-':>6}  {case.causal!s:6}"
        print(f"{shape}  {cost(case, 'ascending'):17.2f}  {cost(case, 'descending'):10.3f}")


if __name__ == "__main__":
    main()
