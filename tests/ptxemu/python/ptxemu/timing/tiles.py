"""From a few tiles on one SM to a whole launch on 132 of them.

A launch of the real size has thousands of tiles of a few lengths. What a tile costs is taken from small launches, on a
device with one SM: cycles = start + tiles * per_tile + blocks * per_block. The real tiles are then dealt out in their order,
each to the SM that is free first.
"""

import heapq
from dataclasses import dataclass

import numpy as np

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
    """samples: (tiles, blocks in all of them, cycles) of at least three launches"""
    rows = np.array([[1.0, tiles, blocks] for tiles, blocks, _ in samples])
    cycles = np.array([cycles for *_, cycles in samples])
    if np.linalg.matrix_rank(rows) < 3:
        raise ValueError("the launches do not tell tiles from blocks: give them tiles of different lengths")
    start, tile, block = np.linalg.lstsq(rows, cycles, rcond=None)[0]
    return Cost(float(start), float(tile), float(block))


def makespan(cost: Cost, lengths: list[int], sms: int = SMS) -> float:
    """Cycles until the last tile is done. lengths: blocks of each tile, in the order in which they are handed out"""
    free = [0.0] * min(sms, max(len(lengths), 1))
    for blocks in lengths:
        heapq.heapreplace(free, free[0] + cost.of(blocks))
    return cost.start + max(free)


def microseconds(cycles: float, mhz: float, launches: int = 1) -> float:
    return cycles / mhz + launches * LAUNCH_US


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
