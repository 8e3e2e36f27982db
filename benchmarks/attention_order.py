"""What a fixed order of the sums of dq costs the attention backward: a model of who waits for whom, on no GPU.

    python benchmarks/attention_order.py

Time is counted in steps of one block of keys times one block of queries. CTAs take tiles (a block of keys of a head)
from a counter, and walk over their queries in ascending order; a block of keys adds to a block of queries only after
the one before it, in ascending or in descending order of keys, has.
"""

import heapq
from dataclasses import dataclass

# Steps: what a tile takes beside its products, and until an addition is seen by the CTA that waits for it.
TILE, SEEN = 1.0, 0.5


@dataclass(frozen=True)
class Case:
    tokens: int
    heads: int  # of all sequences together
    head_dim: int
    window: int | None = None

    @property
    def blocks(self) -> tuple[int, int]:
        """Queries and keys of a step, as csrc/attention/attention_bwd_tile.cuh has them"""
        return (128, 128) if self.head_dim <= 64 else (64, 128)

    def queries(self, n: int) -> range:
        """Blocks of queries that see the n-th block of keys, causally."""
        rows, keys = self.blocks
        last = self.tokens - 1 if self.window is None else min(self.tokens, (n + 1) * keys + self.window - 1) - 1
        return range(n * keys // rows, last // rows + 1)


def steps(case: Case, order: str, sms: int = 132) -> float:
    """Until all is done. order: "any", "ascending" or "descending" """
    key_blocks = range(-(-case.tokens // case.blocks[1]))
    free, added = [0.0] * sms, {}
    for n in reversed(key_blocks) if order == "descending" else key_blocks:
        for head in range(case.heads):
            time = heapq.heappop(free) + TILE
            for m in case.queries(n):
                time += 1
                if order != "any":
                    time = max(time, added.get((head, m), -SEEN) + SEEN)
                    added[head, m] = time
            heapq.heappush(free, time)
    return max(free)


CASES = [
    Case(32768, 16, 64, 128), Case(32768, 128, 64, 128), Case(8192, 12, 64, 256), Case(32768, 16, 64, 1024),
    Case(8192, 32, 128, 1024), Case(4096, 32, 128), Case(8192, 32, 128), Case(8192, 32, 64), Case(16384, 16, 128),
]  # fmt: skip


def main() -> None:
    print("tokens  heads  D    window  ascending  descending (times the steps in any order)")
    for case in CASES:
        ascending, descending = (steps(case, order) / steps(case, "any") for order in ("ascending", "descending"))
        window = case.window or "-"
        print(f"{case.tokens:6}  {case.heads:5}  {case.head_dim:3}  {window:>6}  {ascending:9.2f}  {descending:10.2f}")


if __name__ == "__main__":
    main()
