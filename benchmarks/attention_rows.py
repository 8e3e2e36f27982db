"""Finds rows of the launch tables in gptkernels/ops/attention/triton_launch.py and prints them: the largest tiles that
compile without spills. `gptkernels tune` measures on a GPU which of them are the fastest.

    python benchmarks/attention_rows.py --arch 90 [--pointers]

For each kernel, head size and element size, compiled for the architecture by Triton's own assembler, dense and banded;
no GPU. --pointers: rows for what TMA cannot address.
"""

import argparse
import contextlib
import functools
import itertools
import json
import sys
from pathlib import Path

import torch

from gptkernels import remembered
from gptkernels.launch import ARCHS, shipped
from gptkernels.ops.attention import triton_kernels
from gptkernels.ops.attention.record import AttentionCall
from gptkernels.ops.attention.visibility import sides

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
        left, right = sides(True, window)
        call = AttentionCall(q, k, v, left=left, right=right, scale=head_size**-0.5)
        if kernel == "fwd":
            yield functools.partial(triton_kernels.attention_fwd, call)
        else:
            yield functools.partial(triton_kernels.attention_bwd, call, dout, out, lse, True)


def compiles(calls: list, arch: int) -> bool:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from compile_gate import assert_within_limits, compiled_launches
    from triton.runtime.errors import OutOfResources

    try:
        for call in calls:
            with compiled_launches(arch) as launches:
                call()
            assert_within_limits(launches[0])
    except (AssertionError, OutOfResources):
        return False
    return True


def largest(table: dict, kernel: str, element_size: int, row: int, arch: int, pointers: bool) -> tuple | None:
    """-> the row for the table"""
    dtype = torch.bfloat16 if element_size == 2 else torch.float32  # which takes more registers than float16
    calls = list(runs(kernel, HEAD_SIZES[row], dtype, "cpu", 256, pointers))
    saved = table[row]
    with only(kernel):
        for candidate in candidates(kernel, element_size):
            table[row] = candidate
            remembered.forget()
            if compiles(calls, arch):
                break
        else:
            candidate = None
    table[row] = saved
    return candidate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, choices=ARCHS, required=True)
    parser.add_argument("--kernel", choices=KERNELS, nargs="*", default=list(KERNELS))
    parser.add_argument("--head", type=int, choices=HEAD_SIZES, nargs="*", default=list(HEAD_SIZES))
    parser.add_argument("--bytes", type=int, choices=(2, 4), nargs="*", default=(2, 4), help="per element")
    parser.add_argument("--pointers", action="store_true", help="rows for what TMA cannot address")
    options = parser.parse_args()
    for element_size, kernel, row in itertools.product(options.bytes, options.kernel, options.head):
        suffix = "_float32" if element_size == 4 else "_tma" if options.arch == 90 and not options.pointers else ""
        table = shipped(options.arch)[f"attention_{kernel}{suffix}"]
        if row not in table:
            continue
        best = largest(table, kernel, element_size, row, options.arch, options.pointers)
        print(json.dumps({"bytes": element_size, "kernel": kernel, "head": row, "row": best}), flush=True)


if __name__ == "__main__":
    main()
