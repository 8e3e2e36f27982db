"""Finds rows of the launch tables in gptkernels/ops/attention/triton_launch.py and prints them.

    python benchmarks/tune_attention.py                       on the GPU at hand: the fastest row
    python benchmarks/tune_attention.py --compile-for 90      without a GPU: the largest tile that does not spill
    python benchmarks/tune_attention.py --pointers            rows for what TMA cannot address

For each kernel, head size and element size. On a GPU a row is timed on 16k causal tokens, dense and in a band of 1024,
and the sum counts; a row that does not fit the GPU is passed over, one that spills is not special. Without a GPU rows
are compiled for the architecture by Triton's own assembler, dense and banded.
"""

import argparse
import contextlib
import itertools
import json
import sys
from pathlib import Path

import torch

from gptkernels import hardware
from gptkernels.ops.attention import triton_kernels
from gptkernels.ops.attention.triton_launch import TABLES, TMA_ROWS, table_arch

KERNELS = {"fwd": "attention_fwd_kernel", "dq": "attention_bwd_dq_kernel", "dkdv": "attention_bwd_dkdv_kernel"}
# A head size of each row; 40, 80 and 160 are kept in two parts.
HEAD_SIZES = {16: 16, 32: 32, 48: 40, 64: 64, 96: 80, 128: 128, 192: 160, 256: 256}
WINDOWS = (None, 1024)


def candidates(kernel: str, element_size: int) -> list[tuple[int, int, int, int]]:
    """(BLOCK_M, BLOCK_N, warps, stages), the most work per byte first: for dkdv the keys stay, else the queries do."""
    sizes = (128, 64, 32, 16)
    found = []
    for stay, pass_by in itertools.product(sizes, sizes):
        if pass_by <= stay and stay * pass_by <= 128 * 128 // (element_size // 2):
            block = (pass_by, stay) if kernel == "dkdv" else (stay, pass_by)
            found += [(*block, warps, stages) for warps in (8, 4) for stages in (3, 2, 1)]
    return sorted(found, key=lambda row: -(row[0] * row[1]) / (row[0] + row[1]))


class OnlyThis:
    """Takes the place of kernels that are not being tuned."""

    def __getitem__(self, grid):
        return lambda *args, **options: None


@contextlib.contextmanager
def only(kernel: str):
    saved = {name: getattr(triton_kernels, name) for name in KERNELS.values()}
    for name in saved:
        if name != KERNELS[kernel]:
            setattr(triton_kernels, name, OnlyThis())
    try:
        yield
    finally:
        for name, value in saved.items():
            setattr(triton_kernels, name, value)


def runs(kernel: str, head_size: int, dtype: torch.dtype, device: str, tokens: int, pointers: bool):
    """Calls that launch `kernel` once each, dense and banded"""
    q, k, v, out, dout = (torch.randn(1, 16, tokens, head_size, device=device, dtype=dtype) for _ in range(5))
    if pointers:
        # A stride of 0, which TMA cannot address.
        q, k, v, dout = (x[:, :1].expand_as(x) for x in (q, k, v, dout))
    lse = torch.randn(1, 16, tokens, device=device)
    for window in WINDOWS:
        if kernel == "fwd":
            yield lambda window=window: triton_kernels.attention_fwd(
                q, k, v, None, None, None, True, window, head_size**-0.5, 0.0
            )
        else:
            yield lambda window=window: triton_kernels.attention_bwd(
                dout, q, k, v, out, lse, None, None, None, True, window, head_size**-0.5, 0.0, True
            )


def milliseconds(calls: list) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return sum(do_bench(call, return_mode="median") for call in calls)
    except OutOfResources:
        return float("inf")


def compiles(calls: list, arch: int) -> bool:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from compile_gate import assert_within_limits, compiled_launches

    try:
        for call in calls:
            with compiled_launches(arch) as launches:
                call()
            assert_within_limits(launches[0])
    except AssertionError:
        return False
    return True


def tune(table: dict, kernel: str, element_size: int, row: int, compile_for: int | None, pointers: bool) -> tuple:
    """-> the row for the table, and the milliseconds it takes or None"""
    dtype = torch.float16 if element_size == 2 else torch.float32
    device, tokens = ("cpu", 256) if compile_for else ("cuda", 16384)
    calls = list(runs(kernel, HEAD_SIZES[row], dtype, device, tokens, pointers))
    saved, best, best_time = table[row], None, float("inf")
    with only(kernel):
        for candidate in candidates(kernel, element_size):
            table[row] = candidate
            if compile_for:
                if compiles(calls, compile_for):
                    best, best_time = candidate, None
                    break
            elif (time := milliseconds(calls)) < best_time:
                best, best_time = candidate, time
    table[row] = saved
    return best, best_time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-for", type=int, choices=sorted(TABLES), help="no GPU: an architecture")
    parser.add_argument("--kernel", choices=KERNELS, nargs="*", default=list(KERNELS))
    parser.add_argument("--head", type=int, choices=HEAD_SIZES, nargs="*", default=list(HEAD_SIZES))
    parser.add_argument("--bytes", type=int, choices=(2, 4), nargs="*", default=(2, 4), help="per element")
    parser.add_argument("--pointers", action="store_true", help="rows for what TMA cannot address")
    options = parser.parse_args()
    arch = table_arch(options.compile_for or hardware.arch(torch.device("cuda")))
    for element_size, kernel, row in itertools.product(options.bytes, options.kernel, options.head):
        tma = arch == 90 and element_size == 2 and not options.pointers
        table = TMA_ROWS[kernel] if tma else TABLES[arch][element_size][kernel]
        if row not in table:
            continue
        best, time = tune(table, kernel, element_size, row, options.compile_for, options.pointers)
        print(json.dumps({"bytes": element_size, "kernel": kernel, "head": row, "row": best, "ms": time}), flush=True)


if __name__ == "__main__":
    main()
