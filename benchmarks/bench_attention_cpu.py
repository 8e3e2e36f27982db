"""Banded attention on this CPU: time against PyTorch's attention with a mask, and memory as the sequence grows.

    python benchmarks/bench_attention_cpu.py

One line of JSON per measurement. Time: the median of --repeats. FLOPs: 4 D nnz forward, 10 D nnz backward per head,
nnz = T w - w (w - 1) / 2. Memory: what a fresh process has at its peak beyond what it had with the inputs made.
Results are checked against the masked attention before anything is timed.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from gptkernels.ops.attention import attention
from gptkernels.ops.attention.visibility import visible

HEADS, HEAD_SIZE, WINDOW = 12, 64, 256


def make(length: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, HEADS, length, HEAD_SIZE, requires_grad=True) for _ in range(3)]


def banded(q, k, v):
    return attention(q, k, v, window=WINDOW, backend="eager")


def masked(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible(q.shape[2], k.shape[2], True, WINDOW))


def forward_backward(op, tensors: list[torch.Tensor]):
    out = op(*tensors)
    return out, *torch.autograd.grad(out, tensors, torch.ones_like(out))


def median_seconds(op, tensors: list[torch.Tensor], repeats: int) -> float:
    forward_backward(op, tensors)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        forward_backward(op, tensors)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def compare_time(length: int, repeats: int) -> dict:
    for a, b in zip(forward_backward(banded, make(1024)), forward_backward(masked, make(1024)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    tensors = make(length)
    ours, theirs = median_seconds(banded, tensors, repeats), median_seconds(masked, tensors, min(repeats, 3))
    flops = 14 * HEAD_SIZE * HEADS * (length * WINDOW - WINDOW * (WINDOW - 1) // 2)
    return {
        "what": "forward and backward, seconds",
        "T": length,
        "window": WINDOW,
        "banded": round(ours, 4),
        "masked": round(theirs, 4),
        "ratio": round(theirs / ours, 2),
        "banded_gflops": round(flops / ours / 1e9, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def peak_kib() -> int:
    """Of this process since it began; getrusage would count what its parent had as well."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def extra_memory(length: int) -> None:
    """Prints the peak beyond the inputs, in MiB."""
    forward_backward(banded, make(512))
    tensors = make(length)
    before = peak_kib()
    forward_backward(banded, tensors)
    print((peak_kib() - before) / 1024)


def measure_memory(length: int) -> dict:
    command = [sys.executable, os.path.abspath(__file__), "--memory-of", str(length)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    inputs = 3 * HEADS * length * HEAD_SIZE * 4 / 2**20
    return {
        "what": "peak memory beyond the inputs, MiB",
        "T": length,
        "window": WINDOW,
        "banded": round(float(output), 1),
        "inputs": inputs,
        "one dense mask of float32": length * length * 4 / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        return extra_memory(arguments.memory_of)
    print(json.dumps(compare_time(arguments.length, arguments.repeats)), flush=True)
    for length in (4096, 8192, 16384, 32768):
        print(json.dumps(measure_memory(length)), flush=True)


if __name__ == "__main__":
    main()
