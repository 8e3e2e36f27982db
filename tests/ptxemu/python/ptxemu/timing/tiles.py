"""From a few tiles on one SM to a whole launch on 132 of them.

A launch of the real size has thousands of tiles of a few lengths. What a tile costs is taken from small launches, on a
device with one SM: cycles = start + tiles * per_tile + blocks * per_block. The real tiles are then dealt out in their order,
each to the SM that is free first.

Long tiles hide more of what is not in their blocks than short ones do, so that a block seems to cost less than it keeps
the busiest unit for. No launch is therefore said to take less than its tiles keep any unit busy.
"""

import heapq
from dataclasses import dataclass, field

import numpy as np

from . import Recorded, Timed
from .units import LAUNCH_US, SMS


@dataclass(frozen=True)
class Cost:
    """Cycles"""

    start: float
    tile: float
    block: float

    def of(self, blocks: float) -> float:
        return self.tile + self.block * blocks


def fit_cost(samples: list[tuple[int, int, float]]) -> Cost:
    """samples: (tiles, blocks in all of them, cycles) of at least three launches, two where tiles have no blocks"""
    columns = 3 if any(blocks for _, blocks, _ in samples) else 2
    rows = np.array([[1.0, tiles, blocks] for tiles, blocks, _ in samples])[:, :columns]
    cycles = np.array([cycles for *_, cycles in samples])
    if np.linalg.matrix_rank(rows) < columns:
        raise ValueError("the launches do not tell tiles from blocks: give them tiles of different lengths")
    start, tile, *block = np.linalg.lstsq(rows, cycles, rcond=None)[0]
    return Cost(float(start), float(tile), float(block[0]) if block else 0.0)


def makespan(cost: Cost, lengths: list[int], sms: int = SMS) -> float:
    """Cycles until the last tile is done. lengths: blocks of each tile, in the order in which they are handed out"""
    free = [0.0] * min(sms, max(len(lengths), 1))
    for blocks in lengths:
        heapq.heapreplace(free, free[0] + cost.of(blocks))
    return cost.start + max(free)


PER_SCHEDULER = ("fma", "alu", "xu")  # units that each of an SM's four schedulers has


def busy_cycles(recorded: Recorded, timed: Timed) -> dict[str, float]:
    """For how long each unit of an SM was busy, on average over the launch's SMs and a unit's copies"""
    copies = {unit: recorded.cluster_size * (4 if unit in PER_SCHEDULER else 1) for unit in timed.busy}
    return {unit: cycles / copies[unit] for unit, cycles in timed.busy.items()}


@dataclass
class Stage:
    """One kernel of a pass, at the size that is asked for."""

    name: str
    samples: list[tuple[int, int, Recorded]]  # tiles, blocks in all of them, a small launch on one SM (or one cluster)
    lengths: list[int]  # blocks of each tile of the real launch, in order
    shares: dict[str, float] = field(default_factory=dict)  # of traffic that goes on to HBM
    slots: int = SMS  # what works on one tile each: SMs or clusters

    def timed(self, mhz: float, **changes: float) -> list[Timed]:
        return [recorded.time(mhz, **{**self.shares, **changes}) for *_, recorded in self.samples]

    def cost(self, mhz: float, **changes: float) -> Cost:
        return self._fit([timed.cycles for timed in self.timed(mhz, **changes)])

    def limits(self, mhz: float, **changes: float) -> dict[str, Cost]:
        """What a tile and a block keep each unit busy for"""
        busy = [busy_cycles(sample[-1], timed) for sample, timed in zip(self.samples, self.timed(mhz, **changes))]
        return {unit: self._fit([cycles[unit] for cycles in busy]) for unit in busy[0]}

    def _fit(self, cycles: list[float]) -> Cost:
        return fit_cost([(*sample[:2], value) for sample, value in zip(self.samples, cycles)])

    def microseconds(self, mhz: float, **changes: float) -> float:
        costs = [self.cost(mhz, **changes), *self.limits(mhz, **changes).values()]
        return max(makespan(cost, self.lengths, self.slots) for cost in costs) / mhz + LAUNCH_US


def streaming(name: str, samples: list[tuple[int, Recorded]], amount: int) -> Stage:
    """A kernel whose work is so many equal pieces, spread evenly: rows, say. samples: (pieces, a launch on one SM)"""
    return Stage(name, [(pieces, 0, recorded) for pieces, recorded in samples], [0] * amount)


def attention_blocks(
    tokens: int, own: int, other: int, causal: bool, window: int | None = None, backward: bool = False
) -> list[int]:
    """Blocks that each tile of one head visits. own: rows of a tile, other: rows of a block"""
    lengths = []
    reach = tokens if window is None else window
    for start in range(0, tokens, own):
        end = min(start + own, tokens)
        if not causal:
            first, last = (0, tokens) if window is None else (max(0, start - reach + 1), min(tokens, end + reach - 1))
        elif backward:
            first, last = start, min(tokens, end + reach - 1)
        else:
            first, last = max(0, start - reach + 1), end
        lengths.append((last - 1) // other - first // other + 1)
    return lengths


def attention_order(lengths: list[int], heads: int, head_bytes: int, longest_first: bool = True) -> list[int]:
    """Tiles of all heads: sections of heads whose keys and values fit L2, in each the longest tiles first."""
    section = max(1, (32 << 20) // head_bytes)
    section = 1 << (section.bit_length() - 1)
    by_length = sorted(lengths, reverse=True) if longest_first else lengths
    order = []
    for first in range(0, heads, section):
        count = min(section, heads - first)
        order += [blocks for blocks in by_length for _ in range(count)]
    return order


def attention_shares(
    tokens: int, head_dim: int, lengths: list[int], own: int, other: int, backward: bool = False
) -> dict[str, float]:
    """How much of what one head's tiles load and store goes on to HBM, if L2 keeps what is used again."""
    blocks, row = sum(lengths), 2 * head_dim  # bytes of a row in 16 bits
    if not backward:
        loaded = len(lengths) * own * row + blocks * other * 2 * row
        return {"dram_read_share": min(1.0, 3 * tokens * row / loaded), "dram_write_share": 1.0}
    loaded = len(lengths) * own * 2 * row + blocks * other * 2 * row
    stored = 2 * tokens * row + blocks * other * 2 * row  # dk, dv; dq, added up in float32
    return {
        "dram_read_share": min(1.0, 4 * tokens * row / loaded),
        "dram_write_share": min(1.0, 4 * tokens * row / stored),
    }


def attention_stage(
    name: str,
    record,
    tokens: int,
    heads: int,
    head_dim: int,
    own: int,
    other: int,
    *,
    causal: bool = True,
    window: int | None = None,
    backward: bool = False,
) -> Stage:
    """record(tokens, heads) -> the small launch. own: rows of a tile, other: rows of a block; heads: of all sequences"""
    short, long = (4, 12) if window is None else (8, 16)
    samples = []
    for count, of in ((short, 2), (short, 4), (long, 1)):
        lengths = attention_blocks(count * own, own, other, causal, window, backward)
        samples.append((len(lengths) * of, sum(lengths) * of, record(count * own, of)))
    lengths = attention_blocks(tokens, own, other, causal, window, backward)
    order = attention_order(lengths, heads, tokens * head_dim * 4)
    return Stage(name, samples, order, attention_shares(tokens, head_dim, lengths, own, other, backward))
