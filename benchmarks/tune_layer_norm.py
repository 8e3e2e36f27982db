"""Finds the launch tables of gptkernels/ops/layer_norm/triton_kernels.py on the GPU at hand and prints them.

    python benchmarks/tune_layer_norm.py [--json results.json]

For each longest row of the tables every (ROWS, BLOCK, num_warps) that fits is timed, forward and backward, at a row
count that fills the GPU, in bfloat16 with a residual; the fastest is printed as a table to paste.
"""

import argparse
import itertools
import json

import torch
import triton
from triton.testing import do_bench

from gptkernels.ops.layer_norm import triton_kernels

BYTES = 2**28


def candidates(columns: int) -> list[tuple[int, int, int]]:
    """(ROWS, BLOCK, num_warps), with 4 to 64 elements a thread; BLOCK 0 holds the whole row."""
    found = []
    for rows, block, warps in itertools.product((1, 2, 4, 8, 16), (0, 2048, 4096, 8192), (1, 2, 4, 8, 16, 32)):
        elements = rows * (block or triton.next_power_of_2(columns)) / (32 * warps)
        if 4 <= elements <= 64 and (block == 0 or (columns > block and rows == 1)):
            found.append((rows, block, warps))
    return found


def time_with(table: dict, key: int, row: tuple, run) -> float:
    """Median milliseconds of run() with `row` as the table's entry for `key`."""
    saved = table[key]
    table[key] = row
    try:
        return do_bench(run, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    finally:
        table[key] = saved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write every timing there")
    options = parser.parse_args()
    timings, best = [], {"FWD_LAUNCH": {}, "BWD_LAUNCH": {}}
    rows_to_tune = [(name, columns) for name in best for columns in getattr(triton_kernels, name)]
    for name, columns in rows_to_tune:
        x, residual, dy = torch.randn(3, BYTES // (2 * columns), columns, device="cuda", dtype=torch.bfloat16)
        weight, bias = torch.randn(2, columns, device="cuda", dtype=torch.bfloat16)
        _, h, mean, rstd = triton_kernels.layer_norm_fwd(x, residual, weight, bias, None, 1e-5, 0.0)

        def forward(x=x, residual=residual, weight=weight, bias=bias):
            triton_kernels.layer_norm_fwd(x, residual, weight, bias, None, 1e-5, 0.0)

        def backward(dy=dy, h=h, weight=weight, mean=mean, rstd=rstd):
            triton_kernels.layer_norm_bwd(dy, dy, h, weight, mean, rstd, None, 0.0, True, True)

        run = forward if name == "FWD_LAUNCH" else backward
        for row in candidates(columns):
            milliseconds = time_with(getattr(triton_kernels, name), columns, row, run)
            gigabytes_per_s = 4 * x.numel() * 2 / milliseconds / 1e6
            timings.append({"table": name, "columns": columns, "row": row, "ms": milliseconds, "GB/s": gigabytes_per_s})
            if milliseconds < best[name].get(columns, (float("inf"),))[0]:
                best[name][columns] = (milliseconds, row, gigabytes_per_s)
        _, row, gigabytes_per_s = best[name][columns]
        print(f"{name} {columns}: {row}  {gigabytes_per_s:.0f} GB/s", flush=True)
        if options.json:
            with open(options.json, "w") as file:
                json.dump({"gpu": torch.cuda.get_device_name(), "timings": timings}, file, indent=1)
    for name, rows in best.items():
        print(f"{name} = {{{', '.join(f'{columns}: {row}' for columns, (_, row, _) in rows.items())}}}")


if __name__ == "__main__":
    main()
