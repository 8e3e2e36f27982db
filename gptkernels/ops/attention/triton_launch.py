"""Launch tables of the attention kernels, made by benchmarks/tune_attention.py.

By kernel, architecture, bytes per element and head size (rounded up to a power of two):
BLOCK_M, BLOCK_N, warps, stages.
"""

_16_BIT_LARGE = {  # 160 KiB of shared memory and more
    "fwd": {16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    "dq": {16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 8, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 1)},
    "dkdv": {16: (64, 128, 4, 3), 32: (64, 128, 4, 3), 64: (64, 128, 8, 2), 128: (32, 64, 4, 2), 256: (32, 64, 8, 1)},
}
_32_BIT_LARGE = {
    "fwd": {16: (64, 32, 4, 2), 32: (64, 32, 4, 2), 64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (32, 32, 8, 1)},
    "dq": {16: (64, 32, 4, 2), 32: (64, 32, 4, 2), 64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
    "dkdv": {16: (32, 64, 4, 2), 32: (32, 64, 4, 2), 64: (32, 64, 8, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
}
TABLES = {arch: {2: _16_BIT_LARGE, 4: _32_BIT_LARGE} for arch in (80, 89, 90, 100)}


def table_arch(arch: int) -> int:
    """The architecture whose rows serve `arch`. Those with about 100 KiB of shared memory share a table."""
    if arch in (86, 89) or arch >= 120:
        return 89
    return 100 if arch >= 100 else 90 if arch >= 90 else 80


def head_parts(head_size: int) -> tuple[int, int]:
    """Powers of two that hold a head in one part or two: 64 -> 64, 0; 80 -> 64, 16; 96 -> 64, 32; 120 -> 128, 0"""
    whole = 1 << (head_size - 1).bit_length()
    rest = max(16, 1 << (head_size - whole // 2 - 1).bit_length())
    return (whole, 0) if whole // 2 + rest >= whole else (whole // 2, rest)


def launch_row(kernel: str, arch: int, element_size: int, head_size: int) -> dict:
    head = 1 << (head_size - 1).bit_length()
    block_m, block_n, warps, stages = TABLES[table_arch(arch)][element_size][kernel][head]
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "STAGES": stages}
