"""Finds LAUNCH of gptkernels/ops/linear_cross_entropy/triton_kernels.py on the GPU at hand and prints it.

python benchmarks/tune_linear_cross_entropy.py
"""

import torch
from triton.testing import do_bench

from gptkernels.ops.linear_cross_entropy import triton_kernels

ROWS = 512


def main() -> None:
    best = {}
    for longest in triton_kernels.LAUNCH:
        vocabulary = min(longest, 50257)
        logits = torch.randn(ROWS, (vocabulary + 7) // 8 * 8, device="cuda", dtype=torch.bfloat16)[:, :vocabulary]
        targets = torch.randint(0, vocabulary, (ROWS,), device="cuda")
        losses, lse = torch.empty(2, ROWS, device="cuda")
        scale = torch.ones((), device="cuda")
        times = {}
        for row in [(block, warps) for block in (1024, 2048, 4096, 8192, 16384) for warps in (4, 8, 16, 32)]:
            triton_kernels.LAUNCH = {longest: row}
            times[row] = do_bench(
                lambda x=(logits, targets, losses, lse, scale): triton_kernels.chunk_loss(*x, -100, True),
                return_mode="median",
            )
        best[longest] = min(times, key=times.get)
        gigabytes_per_s = 2 * logits.numel() * 2 / times[best[longest]] / 1e6
        print(f"{longest}: {best[longest]}  {gigabytes_per_s:.0f} GB/s", flush=True)
    print(f"LAUNCH = {best}")


if __name__ == "__main__":
    main()
