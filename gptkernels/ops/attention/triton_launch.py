"""Which row of the launch tables (gptkernels/launch) an attention kernel takes."""

from ...launch import shipped


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
    name = f"attention_{kernel}"
    # Only on 9.0: wide heads keep to pointers forward, and Triton 3.6 fails to compile these kernels for 10.0.
    tma = addressable and element_size == 2 and row in shipped(arch).get(f"{name}_tma", ())
    rows = shipped(arch)[f"{name}_float32" if element_size == 4 else f"{name}_tma" if tma else name]
    block_m, block_n, warps, stages = rows[row]
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "STAGES": stages, "TMA": tma}
