"""Launch settings of the Triton kernels that differ between architectures, as they are shipped: a file for each. They
are the largest tiles that compile without spills under Triton 3.6 and 3.8 (benchmarks/attention_rows.py finds those of
attention); `gptkernels tune` finds better ones on the GPU at hand.

attention_*: by head size, BLOCK_M, BLOCK_N, warps, stages. Head sizes are the rows' own or the next larger ones: 48, 96
and 192 stand for heads in two parts (ops/attention/triton_blocks.py). *_tma: where TMA loads keys and values (dkdv:
queries and gradients of the output), whose addresses then take no registers, so that tiles may be larger. *_float32:
for 4-byte elements.
decode_row: by padded head size, BLOCK_N, warps, stages.
mlp_*_tile: BLOCK_M, BLOCK_N, BLOCK_K, warps, stages for 16-bit types. mlp_fused_up_to: the widest d at which the fused
epilogue is faster than cuBLAS and a pointwise pass. What it can win shrinks as 266 / d of the products' time; what a
product loses against cuBLAS does not.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

ARCHS = (80, 89, 90, 100)


def of_arch(arch: int) -> int:
    """The architecture whose file serves `arch`. Those with about 100 KiB of shared memory share one."""
    if arch in (86, 89) or arch >= 120:
        return 89
    return 100 if arch >= 100 else 90 if arch >= 90 else 80


@cache
def shipped(arch: int) -> dict[str, Any]:
    """By name: a row, or rows by size"""
    found = json.loads((Path(__file__).parent / f"sm{of_arch(arch)}.json").read_text())
    return {name: as_rows(value) for name, value in found.items()}


def as_rows(value: Any) -> Any:
    if isinstance(value, dict):
        return {int(size): tuple(row) for size, row in value.items()}
    return tuple(value) if isinstance(value, list) else value
