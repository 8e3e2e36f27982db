"""Launch tables of the attention kernels: the largest tiles that compile without spills under Triton 3.6 and 3.8.
benchmarks/attention_rows.py finds them; `gptkernels tune` finds better ones on the GPU at hand.

By bytes per element, kernel and head size: BLOCK_M, BLOCK_N, warps, stages. Head sizes are the rows' own or the next
larger ones: 48, 96 and 192 stand for heads in two parts (see triton_blocks.py).
"""

_FLOAT32 = {
    "fwd": {16: (64, 32, 4, 2), 32: (64, 32, 8, 2), 64: (64, 32, 8, 2), 128: (16, 32, 4, 1)},
    "dq": {16: (64, 32, 4, 2), 32: (64, 32, 4, 2), 64: (32, 32, 8, 1), 128: (16, 16, 4, 1)},
    "dkdv": {16: (32, 64, 8, 2), 32: (16, 32, 4, 1), 64: (16, 16, 8, 1), 128: (16, 16, 8, 1)},
}
_SM80 = {
    2: {
        "fwd": {16: (128, 128, 8, 3), 32: (128, 64, 8, 3), 48: (128, 64, 8, 2), 64: (128, 64, 8, 3),
                96: (128, 64, 8, 2), 128: (128, 32, 8, 2), 192: (16, 32, 4, 1), 256: (32, 32, 8, 1)},
        "dq": {16: (128, 64, 4, 3), 32: (128, 64, 8, 3), 48: (128, 32, 8, 2), 64: (128, 64, 8, 3),
               96: (128, 32, 8, 2), 128: (128, 32, 8, 2), 192: (32, 16, 4, 1), 256: (32, 16, 4, 1)},
        "dkdv": {16: (64, 128, 8, 3), 32: (64, 128, 8, 3), 48: (32, 128, 8, 2), 64: (32, 128, 8, 2),
                 96: (32, 64, 8, 2), 128: (64, 64, 8, 2), 192: (16, 16, 4, 1), 256: (16, 64, 8, 1)},
    },
    4: _FLOAT32,
}  # fmt: skip
_SM90 = {
    2: {
        "fwd": {16: (128, 128, 8, 3), 32: (128, 64, 8, 3), 48: (128, 64, 8, 3), 64: (128, 64, 8, 3),
                96: (128, 64, 8, 3), 128: (128, 64, 8, 3), 192: (64, 32, 8, 1), 256: (32, 32, 8, 1)},
        "dq": {16: (128, 64, 4, 3), 32: (128, 64, 8, 3), 48: (128, 64, 8, 3), 64: (128, 64, 8, 3),
               96: (128, 64, 8, 2), 128: (128, 64, 8, 2), 192: (128, 32, 8, 2), 256: (128, 32, 8, 2)},
        "dkdv": {16: (32, 64, 4, 2), 32: (32, 64, 4, 2), 48: (32, 64, 8, 2), 64: (32, 128, 8, 2),
                 96: (32, 64, 8, 2), 128: (32, 64, 8, 2), 192: (16, 64, 8, 2), 256: (32, 32, 8, 1)},
    },
    4: _FLOAT32,
}  # fmt: skip
_SM100 = {
    2: {
        "fwd": _SM90[2]["fwd"],
        "dq": {**_SM90[2]["dq"], 128: (128, 64, 4, 3), 192: (128, 64, 8, 2)},
        "dkdv": {**_SM90[2]["dkdv"], 64: (64, 128, 8, 2), 192: (64, 64, 8, 2)},
    },
    4: _FLOAT32,
}
TABLES = {80: _SM80, 89: _SM80, 90: _SM90, 100: _SM100}
# For 9.0 where TMA loads keys and values (dkdv: queries and gradients of the output): their addresses take no registers
# then, and tiles may be larger. Wider heads keep to pointers forward. So does 10.0 in all: Triton 3.6 fails to compile
# these kernels for it.
TMA_ROWS = {
    "fwd": {16: (128, 128, 8, 3), 32: (128, 64, 8, 3), 48: (128, 64, 8, 3), 64: (128, 128, 8, 3),
            96: (128, 128, 8, 2), 128: (128, 128, 8, 2), 192: (128, 64, 8, 2)},
    "dq": {16: (128, 64, 4, 3), 32: (128, 64, 8, 3), 48: (128, 64, 8, 3), 64: (128, 64, 8, 3),
           96: (128, 64, 8, 2), 128: (128, 64, 8, 2), 192: (128, 32, 8, 2), 256: (128, 32, 8, 2)},
    "dkdv": {16: (32, 64, 4, 2), 32: (32, 64, 4, 2), 48: (32, 64, 8, 2), 64: (64, 128, 8, 2),
             96: (64, 128, 8, 2), 128: (32, 128, 8, 2), 192: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
}  # fmt: skip


def table_arch(arch: int) -> int:
    """The architecture whose table serves `arch`. Those with about 100 KiB of shared memory share one."""
    if arch in (86, 89) or arch >= 120:
        return 89
    return 100 if arch >= 100 else 90 if arch >= 90 else 80


def head_parts(head_size: int, element_size: int) -> tuple[int, int]:
    """Powers of two that hold a head in one part or two: 64 -> 64, 0; 80 -> 64, 16; 96 -> 64, 32; 120 -> 128, 0.
    Always one in float32, whose products take more registers than two parts leave."""
    whole = 1 << (head_size - 1).bit_length()
    if element_size == 4:
        return whole, 0
    rest = max(16, 1 << (head_size - whole // 2 - 1).bit_length())
    return (whole, 0) if whole // 2 + rest >= whole else (whole // 2, rest)


def launch_row(kernel: str, arch: int, element_size: int, head_size: int, addressable: bool) -> dict:
    """addressable: whether TMA can address what the kernel would load with it, and may"""
    part1, part2 = head_parts(head_size, element_size)
    row = part1 + part1 // 2 if part2 else part1
    tma = addressable and element_size == 2 and table_arch(arch) == 90 and row in TMA_ROWS[kernel]
    rows = TMA_ROWS[kernel] if tma else TABLES[table_arch(arch)][element_size][kernel]
    block_m, block_n, warps, stages = rows[row]
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "STAGES": stages, "TMA": tma}
